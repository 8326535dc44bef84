"""Inputs whose place in memory is part of a captured step."""

import torch
from torch import nn

from was_fx.passes.fixed_inputs import fixed_inputs


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.rand(4))

    def forward(self, x, position, cache, length):
        cache.index_copy_(0, position, self.linear(x * self.table))
        length.add_(1)
        return cache.sum(0) + x


def test_weights_thresholds_and_what_is_written_stay_where_they_are(rewrite):
    module = rewrite(Step(), {"linear": 0.3})
    inputs = torch.rand(1, 4), torch.tensor([2]), torch.zeros(5, 4), torch.tensor(2)
    module(*inputs)
    places = list(module.context.module.graph.find_nodes(op="placeholder"))
    fixed = set(fixed_inputs(module.context))
    assert len(places) == len(module.context.inputs) + 1
    moving = [module.context.inputs[i] for i in range(len(places) - 1) if i not in fixed]
    assert len(places) - 1 in fixed  # the thresholds
    assert sorted(tuple(each.shape) for each in moving) == [(1,), (1, 4)]  # the token and its position

"""torch.topk of a router becomes one kernel in a step whose channels are listed."""

import pytest
import torch
from torch import nn

from was_fx.compile.backend import was
from was_fx.kernels.linear.sparse_experts import reference, sparse_experts
from was_fx.kernels.ops.few_topk import few_topk_op


class Mixture(nn.Module):
    """A router and the product with the experts that it chooses."""

    def __init__(self, **topk) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(6, 16, 24, generator=random).mT)
        self.register_buffer("threshold", torch.rand(6, 16, generator=random))
        self.topk = topk
        self.product = sparse_experts

    def forward(self, x):
        values, experts = torch.topk(x[:, :6].softmax(-1), 2, **self.topk)
        values = values / values.sum(-1, keepdim=True)
        y = self.product(x * 2, self.weight, None, self.threshold, experts.flatten(), None)
        return y * values.reshape(-1, 1)


def run(module, rows, contexts, **options):
    """The graph of the module, which gives what it would give uncompiled."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    step = torch.compile(module, backend=was, options={"lowering": "eager", "lists": True, **options})
    y = step(x)
    module.product = reference
    torch.testing.assert_close(y, module(x))
    return contexts[0]


def targets(context):
    return [node.target for node in context.module.graph.nodes]


@pytest.mark.parametrize("topk", [{}, {"dim": -1}, {"dim": 1, "sorted": False}])
@pytest.mark.parametrize("rows", [1, 4])
def test_topk_becomes_the_op(topk, rows, contexts):
    context = run(Mixture(**topk), rows, contexts)
    assert targets(context).count(few_topk_op) == context.counts["chosen"] == 1
    assert "topk" not in {getattr(each, "__name__", each) for each in targets(context)}


@pytest.mark.parametrize(
    ("topk", "rows", "options", "reason"),
    [
        ({"largest": False}, 1, {}, "not of the largest"),
        ({}, 9, {}, "other numbers than a few short rows"),
        ({}, 1, {"disable": ("replace_topk",)}, None),
        ({}, 1, {"disable": ("list_expert_channels",)}, None),
    ],
)
def test_others_are_left_alone(topk, rows, options, reason, contexts):
    context = run(Mixture(**topk), rows, contexts, **options)
    assert few_topk_op not in targets(context)
    assert reason is None or any(reason in why for _, why in context.declined)

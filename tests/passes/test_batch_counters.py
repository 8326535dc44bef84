"""Counters of a step advance together."""

import pytest
import torch
from torch import nn

from was_fx.kernels.ops.advance import advance_op


class Cache(nn.Module):
    """A Linear, and `step` (module, x) that advances the counters a, b and c."""

    def __init__(self, step):
        super().__init__()
        self.linear, self.step = nn.Linear(12, 12), step
        for i, name in enumerate("abc"):
            self.register_buffer(name, torch.tensor(i))
        self.register_buffer("vector", torch.zeros(2, dtype=torch.long))

    def forward(self, x):
        return self.linear(x), self.step(self, x)


def counted(m, x):
    before = torch.arange(1) + m.a, m.b * 2
    m.a.add_(1)
    m.b.add_(1)
    m.c.add_(1)
    return before


def two_steps(m, x):
    m.a.add_(1)
    m.b.add_(2)
    m.c.add_(1)


def read_after(m, x):
    m.a.add_(1)
    after = m.a * 3
    m.b.add_(1)
    m.c.add_(1)
    return after


def returned(m, x):
    m.b.add_(1)
    m.c.add_(1)
    return m.a.add_(1) * 2


def seen_through_a_view(m, x):
    view = m.a.view(1)
    m.a.add_(1)
    m.b.add_(1)
    after = view * 2
    m.c.add_(1)
    return after


def twice(m, x):
    m.a.add_(1)
    m.b.add_(1)
    m.a.add_(1)
    m.c.add_(1)


def tensors(m, x):
    m.a.add_(m.b)
    m.vector.add_(1)
    m.c.add_(1)


READ = "its result is read in the graph"


@pytest.mark.parametrize(
    ("step", "batched"),
    [(counted, 3), (two_steps, 2), (read_after, 2), (returned, 2), (seen_through_a_view, 2), (twice, 2), (tensors, 0)],
)
def test_counters_and_what_reads_them_are_as_before(listed, step, batched):
    model = Cache(step)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    module = listed(model, {"linear": 0.3}, torch.randn(1, 1, 12))
    plain = Cache(step)
    plain.step(plain, None)
    for name, buffer in plain.named_buffers():
        assert buffer.equal(dict(model.named_buffers())[name]), (name, start)
    assert module.context.counts["batched counters"] == batched
    assert module.targets[advance_op] == (batched > 0)


def test_without_listed_channels_counters_stay(rewrite):
    module = rewrite(Cache(counted), {"linear": 0.3}, lists=False)
    module(torch.randn(1, 1, 12))
    assert module.targets[advance_op] == 0


def test_pass_can_be_left_out(listed):
    module = listed(Cache(counted), {"linear": 0.3}, torch.randn(1, 1, 12), disable=("batch_counters",))
    assert (module.targets[advance_op], module.targets["add_"]) == (0, 3)

"""Realised sparsity is counted beside every sparse Linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.ops.count_dropped import count_dropped
from was_fx.passes.bindings import bindings


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.free = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.free(self.c(F.silu(self.a(x)) * self.b(x)))


SCHEDULE = {"a": 0.5, "b": 0.9, "c": 0.1}


def counts(module):
    return {name: bindings(module.weight(name))[name].counts.tolist() for name in SCHEDULE}


@pytest.mark.parametrize("disable", [(), ("merge_siblings",)], ids=str)
@pytest.mark.parametrize(("prefill", "dense"), [("all", 0), ("sparse", 1), ("half", 3)])
def test_counts_are_those_of_the_sparse_tokens(rewrite, prefill, dense, disable):
    module = rewrite(Net(), SCHEDULE, prefill=prefill, observe=True, disable=disable)
    x = torch.randn(2, 5, 12)
    module(x)
    position = torch.arange(5).expand(2, 5) < dense
    h = F.silu(module.linear("a", x, position)) * module.linear("b", x, position)
    expected = {}
    for name, seen in {"a": x, "b": x, "c": h}.items():
        seen = seen[:, dense:]
        expected[name] = [int((seen.abs() <= module.thresholds[name]).sum()), seen.numel()]
    assert counts(module) == expected
    assert module.targets[count_dropped] == 3
    assert module.context.counts["observed"] == 3


def test_counts_add_up_over_calls(rewrite):
    module = rewrite(Net(), SCHEDULE, prefill="all", observe=True)
    x = torch.randn(2, 5, 12)
    module(x)
    once = counts(module)
    module(x)
    assert counts(module) == {name: [2 * dropped, 2 * seen] for name, (dropped, seen) in once.items()}


def test_dense_prompt_counts_nothing(rewrite):
    module = rewrite(Net(), SCHEDULE, prefill="dense", observe=True)
    module(torch.randn(2, 5, 12))
    assert counts(module) == {name: [0, 0] for name in SCHEDULE}


@pytest.mark.parametrize("options", [{}, {"observe": True, "disable": ("count_dropped",)}], ids=str)
def test_nothing_is_counted_unless_asked_for(rewrite, options):
    module = rewrite(Net(), SCHEDULE, prefill="all", **options)
    module(torch.randn(2, 5, 12))
    assert counts(module) == {name: [0, 0] for name in SCHEDULE}
    assert module.targets[count_dropped] == 0
    assert module.targets[sparse_linear] == 2


def test_linears_that_share_a_weight_are_counted_apart(rewrite):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + self.b(x)

    module = rewrite(Twice(), {"a": torch.zeros(12), "b": torch.full((12,), 9.0)}, prefill="all", observe=True)
    module(torch.randn(1, 3, 12))
    known = bindings(module.module.a.weight)
    assert {name: binding.counts.tolist() for name, binding in known.items()} == {"a": [0, 36], "b": [36, 36]}


def test_linear_called_twice_counts_both(rewrite):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(torch.sin(self.a(x)))

    module = rewrite(Again(), {"a": 0.5}, prefill="all", observe=True)
    module(torch.randn(1, 3, 12))
    assert bindings(module.module.a.weight)["a"].counts[1] == 2 * 36
    assert len(module.context.extra) == 2  # one threshold, one pair of counts

"""Bindings are found on the weight itself, by the path of the module that uses it."""

import pytest
import torch

from was_fx.passes.bindings import Binding, bind, bindings, resolve, state, unbind


def weight_bound_to(*names):
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    for name in names:
        bind(weight, Binding(name, torch.ones(3), torch.zeros(3)))
    return weight


@pytest.mark.parametrize(
    ("names", "path", "found"),
    [
        ((), "a", None),
        (("model.a",), "model.a", "model.a"),
        (("model.a",), "a", "model.a"),
        (("model.a",), "", "model.a"),
        (("model.a",), None, "model.a"),
        (("model.a",), "elsewhere", "model.a"),
        (("model.a", "model.b"), "model.b", "model.b"),
        (("model.a", "model.b"), "b", "model.b"),
        (("model.a", "model.b"), "wrapper.model.b", "model.b"),
        (("model.a", "model.b"), "c", None),
        (("model.a", "model.b"), "odel.b", None),
        (("model.a", "model.b"), None, None),
        (("model.a", "model.b"), "", None),
        (("x.a", "y.a"), "a", None),
        (("x.a", "y.a"), "y.a", "y.a"),
        (("a", "x.a"), "a", "a"),
        (("a", "x.a"), "x.a", "x.a"),
    ],
)
def test_resolve(names, path, found):
    binding = resolve(weight_bound_to(*names), path)
    assert (binding.name if binding else None) == found


@pytest.mark.parametrize("other", [None, 3, torch.zeros(2)], ids=str)
def test_anything_unbound_has_no_bindings(other):
    assert bindings(other) == {}
    assert state(other) is None
    assert resolve(other, "a") is None


def test_unbinding_forgets_everything_and_returns_it():
    weight = weight_bound_to("a", "b")
    known = unbind(weight)
    assert known.stride == (3, 1)
    assert list(known.bindings) == ["a", "b"]
    assert state(weight) is None
    assert unbind(weight) is None


def test_the_first_binding_remembers_the_strides():
    weight = weight_bound_to("a")
    weight.data = weight.data.t().contiguous().t()
    bind(weight, Binding("b", torch.ones(3), torch.zeros(3)))
    assert state(weight).stride == (3, 1)


def test_counts_start_at_zero():
    assert bindings(weight_bound_to("a"))["a"].counts.tolist() == [0, 0]

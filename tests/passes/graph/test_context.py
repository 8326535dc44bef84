"""Options, names of modules, and inputs that the passes add."""

import pytest
import torch
from torch.fx import Graph

from was_fx.passes.bindings import Binding, bind
from was_fx.passes.extra_inputs import ExtraInput
from was_fx.passes.graph.context import Options, module_path
from was_fx.passes.graph.errors import RewriteError


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("L['self'].model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("L['self']", ""),
        ("G['model'].layers.1.up", "layers.1.up"),
        ("L['self']._modules['model']._modules['up']", "model.up"),
        ("model.up", "model.up"),
    ],
)
def test_module_path_is_relative_to_what_was_compiled(prefix, path):
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (prefix, object)}
    assert module_path(node) == path


def test_module_path_of_a_node_outside_of_modules_is_unknown():
    assert module_path(Graph().placeholder("x")) is None


@pytest.mark.parametrize("prefill", ["dense", "sparse", "half", "all"])
def test_options_accept_each_prefill(prefill):
    assert Options(prefill=prefill).prefill == prefill


@pytest.mark.parametrize("prefill", ["", "Dense", "none", None, 1])
def test_options_refuse_any_other_prefill_and_name_the_valid_ones(prefill):
    with pytest.raises(ValueError, match="must be one of dense, sparse, half, all"):
        Options(prefill=prefill)


def bound(*names):
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    for i, name in enumerate(names):
        bind(weight, Binding(name, torch.ones(3), torch.full((3,), float(i))))
    return weight


@pytest.mark.parametrize(
    ("names", "name", "path", "threshold"),
    [
        (("b", "a"), "a", None, 1.0),  # the name the graph was made with
        (("layers.1.a",), "layers.0.a", "a", 0.0),  # another module of the same shape
        (("layers.1.b", "layers.1.a"), "layers.0.a", "a", 1.0),
    ],
)
def test_extra_input_is_read_from_the_weight_of_the_call(names, name, path, threshold):
    assert ExtraInput(1, name, path, "threshold", 3).read([None, bound(*names)]).tolist() == [threshold] * 3


def test_extra_input_of_a_weight_scheduled_under_other_names_is_an_error():
    with pytest.raises(RewriteError, match=r"'layers\.0\.a' was run on a weight that is scheduled as layers\.1\.b"):
        ExtraInput(0, "layers.0.a", "a", "threshold", 3).read([bound("layers.1.b", "layers.1.c")])


@pytest.mark.parametrize(("attribute", "expected"), [("threshold", [-1.0] * 3), ("counts", [0] * 3)])
def test_extra_input_of_a_dense_weight_keeps_every_channel(attribute, expected):
    assert ExtraInput(0, "layers.0.a", "a", attribute, 3).read([bound()]).tolist() == expected

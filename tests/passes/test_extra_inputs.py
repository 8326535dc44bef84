"""Inputs beyond Dynamo's own: the numbers of each call's own weights."""

import torch
from torch import nn

from was_fx.passes.bindings import Binding, bind, bindings, unbind
from was_fx.passes.extra_inputs import own_copy, with_extra_inputs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.b(torch.sin(self.a(x)))


def expected(module, x, prefix=""):
    return module.linear(f"{prefix}b", torch.sin(module.linear(f"{prefix}a", x)))


def test_new_numbers_take_effect_without_a_new_graph(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    first = module(x)
    for name in "ab":
        module.thresholds[name] = torch.rand(12)
        bindings(module.weight(name))[name].threshold.copy_(module.thresholds[name])
    y = module(x)
    torch.testing.assert_close(y, expected(module, x))
    assert not torch.equal(first, y)
    assert len(module.contexts) == 1


def test_new_bindings_take_effect_without_a_new_graph(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    module(x)
    for name in "ab":
        unbind(module.weight(name))
        module.thresholds[name] = torch.rand(12)
        bind(module.weight(name), Binding(name, torch.ones(12), module.thresholds[name]))
    torch.testing.assert_close(module(x), expected(module, x))
    assert len(module.contexts) == 1


def test_modules_of_one_shape_share_a_graph_and_keep_their_own_numbers(rewrite):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Net(), Net(), Net()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    names = [f"layers.{i}.{name}" for i in range(3) for name in "ab"]
    module = rewrite(Layers(), {name: torch.rand(12) for name in names}, prefill="all")
    for layer in module.module.layers:
        layer.compile(backend=module._backend, fullgraph=True)
    x = torch.randn(1, 3, 12)
    want = x
    for i in range(3):
        want = expected(module, want, f"layers.{i}.")
    with torch.no_grad():
        torch.testing.assert_close(module.module(x), want)
    assert len(module.contexts) == 1


def test_weight_that_lost_its_schedule_is_dense_again(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all", observe=True)
    x = torch.randn(1, 3, 12)
    module(x)
    unbind(module.weight("a"))
    unbind(module.weight("b"))
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.module(x))
    assert len(module.contexts) == 1


def test_extra_inputs_follow_all_others_at_a_static_address(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all", observe=True)
    module(torch.randn(1, 3, 12))
    placeholders = module.context.module.graph.find_nodes(op="placeholder")
    added = placeholders[-4:]
    assert [node.name for node in added] == ["was_threshold_0", "was_threshold_1", "was_counts_2", "was_counts_3"]
    assert {node.meta["tensor_dict"]["_dynamo_static_input_type"] for node in added} == {"unguarded"}
    assert len({node._dynamo_source.name for node in added}) == 4


def test_graph_without_extra_inputs_is_called_as_it_is():
    def compiled(*inputs):
        return inputs

    assert with_extra_inputs(compiled, []) is compiled


def test_copy_takes_new_inputs_and_leaves_the_original_alone():
    seen = []

    def backend(module, inputs):
        copy = own_copy(module)
        before = str(module.graph)
        with copy.graph.inserting_before(next(iter(copy.graph.nodes))):
            copy.graph.placeholder("new")
        assert str(module.graph) == before
        assert copy.meta == module.meta
        sources = [
            [n._dynamo_source for n in g.graph.find_nodes(op="placeholder")[i:]] for i, g in enumerate((module, copy))
        ]
        assert sources[0] == sources[1]
        seen.append(copy)
        return module.forward

    torch.compile(Net(), backend=backend)(torch.randn(1, 3, 12))
    assert len(seen) == 1

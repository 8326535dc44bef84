"""Names of modules, graph inputs, and replacing nodes."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from was_fx.passes.graph.context import Context, Options, SparseCall, module_classes, module_path, value


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("L['self']", ""),
        ("L['args'][0].model.layers.0.q", "model.layers.0.q"),
        ("L['args'][0]", ""),
        ("L['model'].lm_head", "lm_head"),
        ("G['model'].layers.1.up", "layers.1.up"),
        ("G['m'].q", "q"),
        ("L['self']._modules['model']._modules['up']", "model.up"),
        ("L['self']._modules['model']._modules['layers']._modules['0'].q", "model.layers.0.q"),
        ("model.up", "model.up"),
        ("L.up", "L.up"),
        ("", ""),
    ],
)
def test_module_path_is_relative_to_what_was_compiled(source, path):
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (source, object)}
    assert module_path(node) == path


def test_module_path_of_a_node_outside_of_modules_is_unknown():
    assert module_path(Graph().placeholder("x")) is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"up": nn.Linear(4, 4)})])

    def forward(self, x):
        return self.layers[1]["up"](self.layers[0](x))


NAMES = ["layers.0.0", "layers.1.up"]
MODEL = Block()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return self.inner(x)


def call(module, x):
    return module(x)


# What is compiled, what it is called with, and the names.
COMPILED = {
    "module": lambda x: (Block(), (x,), NAMES),
    "its call": lambda x: (Block().__call__, (x,), NAMES),
    "its forward": lambda x: (Block().forward, (x,), NAMES),
    "argument": lambda x: (call, (Block(), x), NAMES),
    "one of many arguments": lambda x: (lambda *each: each[0](each[1]), (Block(), x), NAMES),
    "global": lambda x: (lambda x: MODEL(x), (x,), NAMES),
    "below another": lambda x: (Outer(), (x,), [f"inner.{name}" for name in NAMES]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_module_paths_of_dynamo(name):
    compiled, arguments, names = COMPILED[name](torch.ones(1, 4))
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch.compile(compiled, backend=backend, fullgraph=True)(*arguments)
    linears = [node for node in graphs[0].nodes if node.target is torch._C._nn.linear]
    assert [module_path(node) for node in linears] == names
    assert {nn.Linear, nn.Sequential} <= set(module_classes(graphs[0]))


@pytest.fixture
def context():
    """(a·b).sin() + a, with the sine's sparse call."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = graph.call_function(torch.mul, (a, b))
    sine = graph.call_function(torch.sin, (product,))
    total = graph.call_function(torch.add, (sine, a))
    graph.output((total,))
    for node in graph.nodes:
        node.meta["example_value"] = torch.ones(3)
    found = Context(GraphModule(nn.Module(), graph), [torch.zeros(3), torch.ones(3)], Options())
    found.calls.append(SparseCall(sine, product, b, a, b, None, "sine"))
    return found


def nodes(context):
    return {node.name: node for node in context.module.graph.nodes}


def test_inputs_have_positions_and_examples(context):
    by_name = nodes(context)
    assert [context.position(by_name[name]) for name in "ab"] == [0, 1]
    assert context.input_of(by_name["b"]) is context.inputs[1]
    assert [context.is_input(by_name[name]) for name in ("a", "b", "mul")] == [True, True, False]
    assert not context.is_input(3.0)


def test_replacing_a_node_reaches_the_calls(context):
    by_name = nodes(context)
    context.replace(by_name["mul"], by_name["b"])
    assert context.calls[0].x is by_name["b"]
    context.replace(by_name["a"], by_name["b"])
    assert context.calls[0].bias is by_name["b"]
    assert by_name["add"].args == (by_name["sin"], by_name["b"])
    context.erase_unused(by_name["mul"])
    assert "mul" not in nodes(context)


def test_unread_nodes_go_with_what_only_they_read(context):
    by_name = nodes(context)
    context.replace(by_name["sin"], by_name["a"])
    context.erase_unused(by_name["sin"])
    assert set(nodes(context)) == {"a", "b", "add", "output"}  # inputs stay
    context.erase_unused(nodes(context)["add"])
    assert "add" in nodes(context)  # it is read


def test_what_changes_something_stays(context):
    by_name = nodes(context)
    with context.module.graph.inserting_before(by_name["add"]):
        node = context.module.graph.call_method("add_", (by_name["a"], 1))
    context.erase_unused(node)
    assert "add_" in nodes(context)


@pytest.mark.parametrize(
    ("enabled", "requires", "found"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_gradients_are_asked_for_by_an_input_where_they_are_enabled(context, enabled, requires, found):
    context.inputs[0].requires_grad_(requires)
    with torch.set_grad_enabled(enabled):
        assert context.has_gradients is found


def test_value_of_what_is_no_node_is_itself(context):
    assert value(3) == 3
    assert value(nodes(context)["a"]).shape == (3,)

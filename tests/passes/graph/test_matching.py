"""Reading a graph."""

import pytest
import torch
import torch.nn.functional as F

from was_fx.passes.graph.matching import either_order, flattening_of, kind, storage, without_casts, written_storages


@torch.library.custom_op("was_test::fill_second", mutates_args={"second"})
def fill_second(first: torch.Tensor, second: torch.Tensor) -> None:
    second.copy_(first)


@fill_second.register_fake
def _(first, second):
    return None


def graph_of(function, *inputs):
    """Dynamo's graph of a function, and its placeholders by name."""
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (module,) = graphs
    return module.graph, list(module.graph.find_nodes(op="placeholder"))


@pytest.mark.parametrize(
    ("write", "written"),
    [
        (lambda x, y: x * y, []),
        (lambda x, y: x.add_(y), [0]),
        (lambda x, y: x.__iadd__(y), [0]),
        (lambda x, y: x.__setitem__(0, 1.0), [0]),
        (lambda x, y: x[1:].copy_(y[1:]), [0]),
        (lambda x, y: x.view(-1).zero_(), [0]),
        (lambda x, y: F.relu(y, inplace=True), [1]),
        (lambda x, y: torch.sin(x, out=y), [1]),
        (lambda x, y: torch._foreach_add_([x, y], 1.0), [0, 1]),
        (lambda x, y: y.index_copy_(0, torch.tensor([0]), x[:1]), [1]),
        (lambda x, y: torch.ops.was_test.fill_second(x, y), [1]),
        (lambda x, y: torch.ops.was_test.fill_second(second=x, first=y), [0]),
    ],
)
def test_storages_that_are_written(write, written):
    def function(x, y):
        before = x - y  # so that the inputs are in this order
        write(x, y)
        return before, x + y

    graph, inputs = graph_of(function, torch.rand(3, 4), torch.rand(3, 4))
    found = written_storages(graph)
    assert [i for i, node in enumerate(inputs) if storage(node) in found] == written


@pytest.mark.parametrize(
    ("views", "same"),
    [
        (lambda y: y, True),
        (lambda y: y.transpose(1, 2).reshape(1, 1, -1), True),
        (lambda y: y.view(-1), True),
        (lambda y: y.flatten().unsqueeze(0).contiguous(), True),
        (lambda y: torch.reshape(y, (1, 12)), True),
        (lambda y: y.permute(0, 2, 1, 3).flatten(2), True),
        (lambda y: y.transpose(1, 3).reshape(1, 1, -1), False),
        (lambda y: y.permute(0, 3, 1, 2).reshape(-1), False),
        (lambda y: (y * 1).view(-1), False),
        (lambda y: y[..., :2].reshape(-1), False),
    ],
)
def test_flattening_keeps_the_order_of_elements(views, same):
    graph, _ = graph_of(lambda x: views(torch.sin(x)) * 2, torch.rand(1, 4, 1, 3))
    (product,) = [node for node in graph.nodes if node.op == "call_function" and node.args[1:] == (2,)]
    found = flattening_of(product.args[0], {"sin"})
    assert (kind(found) == "sin") == same


@pytest.mark.parametrize(
    ("function", "pairs"),
    [(lambda x, y: x + y, 2), (lambda x, y: torch.add(x, y), 2), (lambda x, y: torch.add(x, y, alpha=2), 0)],
)
def test_only_plain_operations_are_commutative(function, pairs):
    graph, _ = graph_of(function, torch.rand(3), torch.rand(3))
    (node,) = [each for each in graph.nodes if kind(each) == "add"]
    assert len(list(either_order(node))) == pairs


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.type_as(torch.ones(1)),
        lambda x: x.half().float(),
    ],
)
def test_casts_are_looked_through_and_moves_are_not(cast):
    graph, (x,) = graph_of(lambda x: torch.sin(cast(x)), torch.rand(3, dtype=torch.bfloat16))
    (sin,) = [node for node in graph.nodes if kind(node) == "sin"]
    assert without_casts(sin.args[0]) is x
    graph, (x,) = graph_of(lambda x: torch.sin(x.to("meta")), torch.rand(3))
    (sin,) = [node for node in graph.nodes if kind(node) == "sin"]
    assert without_casts(sin.args[0]) is sin.args[0]

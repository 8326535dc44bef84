"""Graphs of small modules, captured by Dynamo, rewritten by the passes and checked."""

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from was_fx.kernels.linear.layout import to_input_major
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.ops.advance import advance_op
from was_fx.kernels.ops.count_dropped import count_dropped
from was_fx.passes.bindings import Binding, bind
from was_fx.passes.extra_inputs import with_extra_inputs
from was_fx.passes.graph.context import Context, Options
from was_fx.passes.pipeline import run


def thresholds_around(threshold: float, channels: int) -> Tensor:
    """[channels], from 0 to twice `threshold`."""
    return torch.linspace(0, 2 * threshold, channels)[torch.randperm(channels)]


class Rewritten:
    """A module compiled through the passes. Every graph is checked when it is made and when it runs.

    Args:
        module: what to compile.
        schedule: threshold, or channel thresholds, by name of a Linear (or of a bare Parameter).
        dynamic: as for torch.compile.
        options: of the passes.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: dict[str, float | Tensor],
        dynamic: bool | None = None,
        run: Callable[..., Context] = run,
        **options,
    ) -> None:
        self.module, self.options, self.contexts, self._run = module, Options(**options), [], run
        self.thresholds: dict[str, Tensor] = {}
        module.requires_grad_(False)
        for name, threshold in schedule.items():
            weight = self.weight(name)
            channels = weight.shape[0 if self._input_major(name) else 1]
            norms = torch.ones(channels)
            limits = threshold if isinstance(threshold, Tensor) else thresholds_around(threshold, channels)
            bind(weight, Binding(name, norms, limits.clone()))
            self.thresholds[name] = limits
            if not self._input_major(name):
                to_input_major(weight)
        self.compiled = torch.compile(module, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def __call__(self, *inputs):
        with torch.no_grad():
            return self.compiled(*inputs)

    @property
    def context(self) -> Context:
        """Of the last graph."""
        return self.contexts[-1]

    @property
    def targets(self) -> Counter:
        """How often the last graph calls each function or method."""
        return Counter(node.target for node in self.context.module.graph.nodes if node.op.startswith("call"))

    def weight(self, name: str) -> nn.Parameter:
        try:
            return self.module.get_parameter(f"{name}.weight")
        except AttributeError:
            return self.module.get_parameter(name)

    def linear(self, name: str, x: Tensor, dense: Tensor | None = None, *, bias: bool = True) -> Tensor:
        """What the sparse Linear `name` must give; `dense` [S] or [B, S] says which tokens keep every channel."""
        dropped = x.abs() <= self.thresholds[name]
        if dense is not None:
            dropped &= ~dense[..., None]
        weight = self.weight(name)
        y = x.masked_fill(dropped, 0) @ (weight if self._input_major(name) else weight.t())
        module = self.module.get_submodule(name.removesuffix(".weight")) if bias and self._is_module(name) else None
        return y if getattr(module, "bias", None) is None else y + module.bias

    def _is_module(self, name: str) -> bool:
        return name in dict(self.module.named_modules())

    def _input_major(self, name: str) -> bool:
        return self._is_module(name) and type(self.module.get_submodule(name)).__name__ == "Conv1D"

    def _backend(self, module: GraphModule, inputs):
        before = describe(module)
        context = self._run(module, inputs, self.options)
        assert describe(module) == before, "Dynamo's own graph was changed"
        check_graph(context, module)
        self.contexts.append(context)
        return with_extra_inputs(Checked(context.module).run, list(context.extra))


class Checked(Interpreter):
    """Runs a graph and compares each value with what the node says of it."""

    def run(self, *inputs):
        self.symbols: dict = {}
        return super().run(*inputs)

    def run_node(self, node: Node):
        result = super().run_node(node)
        expected = node.meta.get("example_value")
        if isinstance(expected, torch.SymInt):
            if node.op == "placeholder":
                self.symbols[expected.node.expr] = result
            assert self._size(expected) == result, node
        if isinstance(expected, Tensor):
            assert (result.dtype, result.device) == (expected.dtype, expected.device), node
            assert list(result.shape) == [self._size(size) for size in expected.shape], node
        return result

    def _size(self, size: int | torch.SymInt) -> int:
        return int(size.node.expr.subs(self.symbols)) if isinstance(size, torch.SymInt) else size


def describe(module: GraphModule) -> list:
    return [
        (
            node.name,
            node.op,
            str(node.target),
            str(node.args),
            str(node.kwargs),
            sorted(map(str, node.meta)),
            str(node.users),
        )
        for node in module.graph.nodes
    ]


def check_graph(context: Context, original: GraphModule) -> None:
    """The invariants of a rewritten graph."""
    graph = context.module.graph
    graph.lint()
    nodes = list(graph.nodes)
    assert list(reversed(graph.nodes)) == nodes[::-1]
    assert all(a._next is b and b._prev is a for a, b in pairwise(nodes))
    assert not set(nodes) & set(original.graph.nodes)
    for node in nodes:
        assert all(arg in nodes and node in arg.users for arg in node.all_input_nodes)
        assert all(user in nodes and node in user.all_input_nodes for user in node.users)
    extra = [node for node in nodes if node.op == "placeholder"][len(context.inputs) :]
    assert extra == list(context.extra.values())
    known = {node.name for node in original.graph.nodes}
    new = [node for node in nodes if node.name not in known and node.target not in (count_dropped, advance_op)]
    assert [node for node in new if node.meta.get("example_value") is None] == []


@pytest.fixture(autouse=True)
def fresh():
    """Dynamo's limit of graphs for one code object counts over all tests; products of these sizes lose by threads."""
    torch.compiler.reset()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.fixture
def rewrite():
    """`Rewritten`, see there."""
    return Rewritten


@pytest.fixture
def listed(monkeypatch):
    """Rewrites a decode step with channels listed, as for a GPU, and checks it against the same without lists."""
    monkeypatch.setattr(
        "was_fx.kernels.parts.triton_parts.interpreted", lambda: False
    )  # the ops' meaning, which is quicker

    def make(module: nn.Module, schedule: dict[str, float | Tensor], *inputs, dynamic: bool | None = None, **options):
        plain = Rewritten(copy.deepcopy(module), schedule, dynamic)
        with_lists = Rewritten(module, dict(plain.thresholds), dynamic, lists=True, **options)
        expected, found = plain(*copy.deepcopy(inputs)), with_lists(*inputs)
        torch.testing.assert_close(found, expected)
        assert sparse_linear in plain.targets
        return with_lists

    return make

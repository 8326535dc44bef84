"""Graphs of small modules with sparse Linears, captured by Dynamo, rewritten by the passes and checked."""

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from was_fx.kernels.linear.layout import to_input_major
from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.kernels.ops.advance import advance_op
from was_fx.modules.linears import LinearModule
from was_fx.modules.sparse_linear import make_sparse
from was_fx.modules.token_rule import TokenRule
from was_fx.passes.graph.context import Context, Numbers, Options
from was_fx.passes.pipeline import observers, run
from was_fx.schedules.files.linear_schedule import LinearSchedule


def thresholds_around(threshold: float, channels: int) -> Tensor:
    """[channels], from 0 to twice `threshold`."""
    return torch.linspace(0, 2 * threshold, channels)[torch.randperm(channels)]


class Rewritten:
    """A module compiled through the passes. Every graph is checked when it is made and when it runs.

    Args:
        module: what to compile.
        schedule: threshold, or channel thresholds, by name of a Linear.
        dynamic: as for torch.compile.
        prefill: which tokens are sparse in a prompt.
        insert: whether the Linears stay dense modules, which the pass `insert` makes sparse.
        run: the passes.
        options: of the passes.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: dict[str, float | Tensor],
        dynamic: bool | None = None,
        *,
        prefill: str = "all",
        insert: bool = False,
        run: Callable[..., Context] = run,
        **options,
    ) -> None:
        self.module, self.contexts, self._run = module, [], run
        self.thresholds: dict[str, Tensor] = {}
        module.requires_grad_(False)
        numbers = {}
        for name, threshold in schedule.items():
            weight, input_major = self.weight(name), self._input_major(name)
            shape = tuple(weight.t().shape if input_major else weight.shape)
            limits = threshold if isinstance(threshold, Tensor) else thresholds_around(threshold, shape[1])
            self.thresholds[name] = limits
            numbers[name] = Numbers(shape, 0.0, 0.0, 1, limits)
            if not insert:
                linear = LinearModule(name, module.get_submodule(name), input_major, False)
                make_sparse(linear, LinearSchedule(0.5, 0.0, 0.0, limits), 1, TokenRule(prefill))
            if not input_major:
                to_input_major(weight)
        if insert:
            options = {"schedule": numbers, "sparse_prompts": prefill == "all"} | options
        self.options = Options(**options)
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
        packets = {torch.ops.was.sparse_linear: sparse_linear}
        calls = (node.target for node in self.context.module.graph.nodes if node.op.startswith("call"))
        return Counter(packets.get(target, target) for target in calls)

    def weight(self, name: str) -> nn.Parameter:
        return self.module.get_submodule(name).weight

    def linear(self, name: str, x: Tensor, dense: Tensor | None = None, *, bias: bool = True) -> Tensor:
        """What the sparse Linear `name` must give; `dense` [S] or [B, S] says which tokens keep every channel."""
        dropped = x.abs() <= self.thresholds[name]
        if dense is not None:
            dropped &= ~dense[..., None]
        weight = self.weight(name)
        y = x.masked_fill(dropped, 0) @ (weight if self._input_major(name) else weight.t())
        own = self.module.get_submodule(name).bias
        return y if own is None or not bias else y + own

    def _input_major(self, name: str) -> bool:
        return hasattr(self.module.get_submodule(name), "nf")

    def _backend(self, module: GraphModule, inputs):
        known = {node.name for node in module.graph.nodes}
        context = self._run(module, inputs, self.options)
        check_graph(context, known)
        self.contexts.append(context)
        return Checked(context.module).run


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


def check_graph(context: Context, known: set[str]) -> None:
    """The invariants of a rewritten graph; `known` are the names of its nodes before."""
    graph = context.module.graph
    graph.lint()
    nodes = list(graph.nodes)
    assert list(reversed(graph.nodes)) == nodes[::-1]
    assert all(a._next is b and b._prev is a for a, b in pairwise(nodes))
    for node in nodes:
        assert all(arg in nodes and node in arg.users for arg in node.all_input_nodes)
        assert all(user in nodes and node in user.all_input_nodes for user in node.users)
    assert len(graph.find_nodes(op="placeholder")) == len(context.inputs)
    for call in context.calls:
        assert {call.node, call.x, call.weight, call.threshold} <= set(nodes)
    new = [node for node in nodes if node.name not in known and node.target != advance_op]
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
def meanings(monkeypatch):
    """The ops of a GPU run by their meaning, which is quicker than Triton's interpreter."""
    monkeypatch.setattr("was_fx.kernels.parts.triton_parts.interpreted", lambda: False)


@pytest.fixture
def contexts(meanings):
    """The contexts of the graphs that are rewritten, in order."""
    found = []
    observers.append(found.append)
    yield found
    observers.remove(found.append)


@pytest.fixture
def listed(meanings):
    """Rewrites a decode step with channels listed, as for a GPU, and checks it against the same without lists."""

    def make(module: nn.Module, schedule: dict[str, float | Tensor], *inputs, dynamic: bool | None = None, **options):
        plain = Rewritten(copy.deepcopy(module), schedule, dynamic)
        with_lists = Rewritten(module, dict(plain.thresholds), dynamic, lists=True, **options)
        expected, found = plain(*copy.deepcopy(inputs)), with_lists(*inputs)
        torch.testing.assert_close(found, expected)
        assert {sparse_linear, sparse_siblings} & set(plain.targets)
        return with_lists

    return make

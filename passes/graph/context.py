"""What the passes of one graph share: options, graph inputs, the sparse calls found, what was done."""

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from was_fx.compat.graphs import is_erased
from was_fx.kernels.quantized.rows import QuantizedRows

Match = TypeVar("Match")


@dataclass(frozen=True, eq=False)
class Numbers:
    """What `insert` needs to know of a scheduled Linear.

    Attributes:
        shape: (N, K).
        threshold: τ.
        exponent: α.
        norm: p of the channel norms.
        channel_threshold: t [K] fp32, which takes the place of τ / g^α; or None.
    """

    shape: tuple[int, int]
    threshold: float
    exponent: float
    norm: int
    channel_threshold: torch.Tensor | None = None


@dataclass(frozen=True)
class Options:
    """What the passes may do.

    Attributes:
        schedule: by qualified name, for a dense model; None for one that is sparsified, or stays dense.
        sparse_prompts: with a schedule: all tokens of prompts are sparse too.
        disable: names of passes to leave out.
        lists: whether a decode step lists its kept channels for the kernels of a GPU; None: when it runs on one.
    """

    schedule: Mapping[str, Numbers] | None = None
    sparse_prompts: bool = False
    disable: tuple[str, ...] = ()
    lists: bool | None = None


@dataclass(eq=False)
class SparseCall:
    """One sparse Linear in the graph.

    Attributes:
        node: computes y [..., N] of this Linear, or of this Linear and its siblings.
        x: [..., K].
        weight: [N, K], a graph input or a view of one; the codes, where it is quantised.
        bias: [N], or None.
        threshold: [K] fp32.
        tokens: bool, which tokens are sparse, or None for all.
        name: dotted path of its module, as far as it is known.
        scales, groups: of a quantised weight, as in `QuantizedRows`.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    threshold: Node
    tokens: Node | None
    name: str
    scales: Node | None = None
    groups: Node | None = None

    @property
    def size(self) -> int:
        """N."""
        return int(value(self.weight).shape[0]) if self.scales is None else self._rows.shape[0]

    @property
    def format(self) -> str | torch.dtype:
        """How the weight is stored: a dtype, "int8" or "int4"."""
        return value(self.weight).dtype if self.scales is None else self._rows.format

    @property
    def group(self) -> int:
        """Outputs of a group of int4; else 0."""
        return 0 if self.groups is None else self.size // int(value(self.groups).shape[1])

    @property
    def _rows(self) -> QuantizedRows:
        return QuantizedRows(value(self.weight), value(self.scales), value(self.groups))


def quantised_parts(calls: Sequence[SparseCall]) -> tuple[list[Node], list[Node]]:
    """Scales and groups of calls of one quantised format; no groups for int8."""
    scales = [call.scales for call in calls if call.scales is not None]
    return scales, [call.groups for call in calls if call.groups is not None]


@dataclass(eq=False)
class Part:
    """A Linear's output before its split-K partials are added: some of their columns.

    Attributes:
        partial: [S, 1, ΣN] fp32 of one token, or [S, ..., ΣN], of the Linear and its siblings.
        start, size: its columns.
        bias: [N], or None.
    """

    partial: Node
    start: int
    size: int
    bias: Node | None


@dataclass(eq=False)
class Context:
    """State of one run of the pipeline over `module`, Dynamo's graph module.

    Attributes:
        inputs: the example of every graph input, in order; a weight's is the Parameter itself.
        calls: sparse Linears in the graph, in order, that no pass has rewritten into something else.
        decode: one new token per sequence, as far as the sparse calls show it.
        weights: with a schedule: positions among the inputs of the weights [N, K] that it names.
        parts: what computes a Linear's output from split-K partials, and those.
        counts: what each pass did.
        declined: (name, reason) of what a pass left alone.
    """

    module: GraphModule
    inputs: list[Any]
    options: Options
    calls: list[SparseCall] = field(default_factory=list)
    decode: bool = False
    weights: list[int] = field(default_factory=list)
    parts: dict[Node, Part] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    declined: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._positions = {node: i for i, node in enumerate(self.module.graph.find_nodes(op="placeholder"))}

    def input_of(self, placeholder: Node) -> Any:
        """The example of a graph input."""
        return self.inputs[self._positions[placeholder]]

    def position(self, placeholder: Node) -> int:
        """Where a graph input lies among the inputs."""
        return self._positions[placeholder]

    def is_input(self, node: object) -> bool:
        """Whether `node` is a graph input."""
        return isinstance(node, Node) and node in self._positions

    def call(self, target: Any, arguments: tuple[Any, ...], example: Any) -> Node:
        """A new node at the graph's insertion point: the call of a function, or of a method by its name."""
        create = self.module.graph.call_method if isinstance(target, str) else self.module.graph.call_function
        node = create(target, arguments)
        node.meta["example_value"] = example
        return node

    def fused(self, op: Any, fake: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Node]:
        """A node for each result of an op with several, which `fake` makes of the arguments' fake values."""
        node = self.call(op, arguments, fake(*map_arg(arguments, value)))
        return [self.call(operator.getitem, (node, i), example) for i, example in enumerate(value(node))]

    def matches(self, nodes: Iterable[Node], match: Callable[[Node], Match | str]) -> Iterator[tuple[Node, Match]]:
        """What `match` finds of each node; its reasons where it finds nothing are noted."""
        for node in nodes:
            found = match(node)
            if isinstance(found, str):
                self.declined.append((node.name, found))
            else:
                yield node, found

    def replace_outputs(self, old: Node, new: Sequence[Node]) -> None:
        """Let what reads result i of `old` read `new[i]`, and erase `old`."""
        for item in list(old.users):
            self.replace(item, new[item.args[1]])  # type: ignore[index]
            self.erase_unused(item)

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of `old`, and the calls among them, read `new`; `old` stays, unused."""
        old.replace_all_uses_with(new)
        for call in self.calls:
            call.x = new if call.x is old else call.x
            call.bias = new if call.bias is old else call.bias

    def erase_unused(self, node: Node) -> None:
        """Erase `node`, and what only it reads, when nothing reads it and it changes nothing in place."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if is_erased(node) or node.users or node.op not in ("call_function", "call_method") or name.endswith("_"):
            return
        inputs = node.all_input_nodes
        self.module.graph.erase_node(node)
        for each in inputs:
            self.erase_unused(each)

    @cached_property
    def has_gradients(self) -> bool:
        """Whether the graph is one to be differentiated."""
        return torch.is_grad_enabled() and any(
            isinstance(each, torch.Tensor) and each.requires_grad for each in self.inputs
        )


def module_path(node: Node) -> str | None:
    """Dotted path of the module that `node` came from, without Dynamo's prefix for the compiled object."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    return re.sub(r"^[LG](\[[^\]]*\])+\.?", "", path).replace("_modules['", "").replace("']", "")


def module_classes(graph: Graph) -> Iterator[type]:
    """The classes of the modules that the nodes of a graph came from."""
    for node in graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            if isinstance(kind, type):
                yield kind


def value(node: object) -> Any:
    """The fake value Dynamo recorded for a node; anything else is its own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node

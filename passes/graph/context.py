"""What the passes of one graph share: options, graph inputs, the Linears found, the inputs added, the counts."""

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch.fx import Graph, GraphModule, Node

from was_fx.passes.bindings import Binding
from was_fx.passes.extra_inputs import ExtraInput, add_placeholder

Prefill = Literal["dense", "sparse", "half", "all"]
Phase = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Options:
    """What the passes may do.

    Attributes:
        prefill: which tokens of a prompt are sparse: "dense" none; "sparse" all but the first 1 % (WAS); "half" the
            last half (TEAL); "all" every one. A decode step is always sparse.
        observe: count dropped channels, for realised sparsity.
        disable: names of passes to leave out.
        lists: whether a decode step lists its kept channels for the kernels of a GPU; None: when it runs on one.
    """

    prefill: Prefill = "dense"
    observe: bool = False
    disable: tuple[str, ...] = ()
    lists: bool | None = None

    def __post_init__(self) -> None:
        if self.prefill not in get_args(Prefill):
            raise ValueError(f"prefill is {self.prefill!r}; it must be one of {', '.join(get_args(Prefill))}")


@dataclass(eq=False)
class LinearSite:
    """One use of a Linear's weight in the graph.

    Attributes:
        node: computes y.
        x: [..., K].
        weight: graph input, [N, K], or [K, N] when `input_major`.
        bias: [N], or None.
        path: dotted path of its module, relative to the compiled one, as far as Dynamo knows it.
        binding: its schedule entry, or None when it is not scheduled.
        shard: this rank's part of `weight`, when that is a DTensor; x and y are then this rank's parts too.
        sparse: the call that replaced it.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    input_major: bool
    path: str | None
    binding: Binding | None
    shard: Node | None = None
    sparse: "SparseCall | None" = None

    @property
    def name(self) -> str:
        """Qualified name in the sparsified model, or what is known of it."""
        return self.binding.name if self.binding else self.path or self.weight.name


@dataclass(eq=False)
class SparseCall:
    """A `was.sparse_linear` node with its arguments by name, and the Linear's own part of them.

    Attributes:
        node: computes y [..., N] of this Linear, or of this Linear and its siblings.
        weight: [N, K], the graph input or a transposed view of it.
        threshold: [K] fp32, a graph input.
        sequence: tokens per sequence.
        dense: leading tokens of each sequence that stay dense.
    """

    node: Node
    weight: Node
    threshold: Node
    sequence: Node | int
    dense: Node | int


@dataclass(eq=False)
class Part:
    """A Linear's output before its parts are added: one of the parts' columns.

    Attributes:
        partial: [S, 1, ΣN] fp32, of the Linear and its siblings.
        start, size: its columns.
        bias: [N], or None.
    """

    partial: Node
    start: int
    size: int
    bias: Node | None


@dataclass(eq=False)
class Context:
    """State of one run of the pipeline over `module`, a copy of Dynamo's graph module.

    Attributes:
        inputs: the example of every graph input, in order; a weight's is the Parameter itself.
        sites: Linears found in the graph, in order.
        phase: decode or prefill, once chosen.
        extra: inputs added after Dynamo's own.
        parts: what computes a Linear's output from parts, and those.
        siblings: per merged call, the weights (graph inputs) it reads.
        counts: what each pass did.
        declined: (name, reason) of what a pass left alone.
    """

    module: GraphModule
    inputs: list[Any]
    options: Options
    sites: list[LinearSite] = field(default_factory=list)
    phase: Phase = "decode"
    extra: dict[ExtraInput, Node] = field(default_factory=dict)
    parts: dict[Node, Part] = field(default_factory=dict)
    siblings: list[list[tuple[Node, Binding]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    declined: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._positions = {node: i for i, node in enumerate(self.module.graph.find_nodes(op="placeholder"))}

    def input_of(self, placeholder: Node) -> Any:
        """The example of a graph input."""
        return self.inputs[self._positions[placeholder]]

    def is_input(self, node: object) -> bool:
        """Whether `node` is one of Dynamo's graph inputs."""
        return isinstance(node, Node) and node in self._positions

    def outputs(self, node: Node, count: int) -> list[Node]:
        """One node for each of the `count` results of `node`, at the graph's insertion point."""
        items = [self.module.graph.call_function(operator.getitem, (node, i)) for i in range(count)]
        for item, example in zip(items, value(node), strict=True):
            item.meta["example_value"] = example
        return items

    def replace_outputs(self, old: Node, new: Sequence[Node]) -> None:
        """Let what reads result i of `old` read `new[i]`, and erase `old`."""
        for item in list(old.users):
            self.replace(item, new[item.args[1]])  # type: ignore[index]
            self.erase_unused(item)

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of `old`, and the Linears of `sites` among them, read `new`; `old` stays, unused."""
        old.replace_all_uses_with(new)
        for site in self.sites:
            site.x = new if site.x is old else site.x
            site.bias = new if site.bias is old else site.bias

    def erase_unused(self, node: Node) -> None:
        """Erase `node`, and what only it reads, when nothing reads it and it changes nothing in place."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node._erased or node.users or node.op not in ("call_function", "call_method") or name.endswith("_"):
            return
        inputs = node.all_input_nodes
        self.module.graph.erase_node(node)
        for each in inputs:
            self.erase_unused(each)

    def extra_input(self, site: LinearSite, attribute: Literal["threshold", "counts"]) -> Node:
        """The graph input that carries a tensor of the binding of `site`, added when it is asked for first."""
        assert site.binding is not None
        tensor = getattr(site.binding, attribute)
        key = ExtraInput(self._positions[site.weight], site.binding.name, site.path, attribute, tensor.shape[0])
        if key not in self.extra:
            self.extra[key] = add_placeholder(self.module.graph, f"was_{attribute}_{len(self.extra)}", tensor)
        return self.extra[key]


def module_path(node: Node) -> str | None:
    """Dotted path of the module that `node` came from, without Dynamo's prefix for the compiled object."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    return re.sub(r"^[LG]\['[^']*'\]\.?", "", path).replace("_modules['", "").replace("']", "")


def value(node: object) -> Any:
    """The fake value Dynamo recorded for a node; anything else is its own value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def weight_view(graph: Graph, site: LinearSite) -> Node:
    """W [N, K] of a Linear at the graph's insertion point: its graph input, or a new view or shard of it."""
    node = site.weight
    if site.shard is not None:
        node = graph.node_copy(site.shard)
    if site.input_major:
        before, node = node, graph.call_method("t", (node,))
        node.meta["example_value"] = value(before).t()
    return node

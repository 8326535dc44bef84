"""Reading Dynamo's graph: what a node does, whichever way it was written."""

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.compat.graphs import is_higher_order, schema_of
from was_fx.compat.tensors import storage_id
from was_fx.passes.graph.context import Context, value

# Names of what writes to its first argument: add_, iadd, setitem, __setitem__.
_IN_PLACE = re.compile(
    r"\w*[a-z]_|_*i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)_*|_*setitem_*"
)

_CASTS = {"to", "float", "type_as", "type", "bfloat16", "half"}
_VIEWS = {"view", "reshape", "transpose", "permute", "contiguous", "flatten", "squeeze", "unsqueeze", "swapaxes"}


def view_of_input(context: Context, node: object) -> Node | None:
    """The graph input that `node` is, or is the transpose of; None for what is computed."""
    if isinstance(node, Node) and kind(node) == "t" and len(node.args) == 1:
        node = node.args[0]
    return node if isinstance(node, Node) and context.is_input(node) else None


def arguments_of(node: Node) -> Any:
    """A node's positional arguments, which may be nodes, numbers, lists, …"""
    return node.args


def named_arguments(node: Node, names: Iterable[str]) -> dict[str, Any]:
    """A node's arguments by name; `names` are those that it may be given by position, in order."""
    return dict(zip(names, arguments_of(node), strict=False)) | node.kwargs


def kind(node: object) -> str:
    """Name of the operation: "mul" for x * y, torch.mul(x, y) and x.mul(y); "" for what is not a call."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def same_shape(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two shapes are known to be the same, sizes that are symbols among them."""
    return len(first) == len(second) and all(map(statically_known_true, map(operator.eq, first, second)))


def without_casts(node: Any) -> Any:
    """The tensor that `node` is, but for its dtype."""
    while kind(node) in _CASTS and isinstance(value(node), torch.Tensor):
        if value(node.args[0]).device != value(node).device:
            break
        node = node.args[0]
    return node


def without_slices(node: Any) -> Any:
    """The tensor that `node` is, past slices that leave nothing out: the last token of a decode step is all of it."""
    while kind(node) == "getitem" and isinstance(value(node.args[0]), torch.Tensor):
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        before, after = value(node.args[0]).shape, value(node).shape
        if not all(isinstance(item, slice) for item in items) or not same_shape(before, after):
            break
        node = node.args[0]
    return node


def either_order(node: Node) -> Iterable[tuple[Any, Any]]:
    """The two operands of a commutative operation, both ways round; none when it has more to it (add's alpha)."""
    if len(node.args) != 2 or node.kwargs:
        return ()
    first, second = node.args
    return (first, second), (second, first)


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a tensor node."""
    example = value(node)
    return example.dtype if isinstance(example, torch.Tensor) else None


def flattening_of(x: Node, kinds: set[str]) -> Node | None:
    """The node of one of `kinds` whose elements `x` holds in the same order, through views only; None without one, and
    where sizes are not known."""
    chain: list[Node] = []
    node: Any = x
    while kind(node) in _VIEWS:
        chain.append(node)
        node = node.args[0]
    if kind(node) not in kinds or not all(isinstance(size, int) for size in value(node).shape):
        return None
    numbers = torch.arange(value(node).numel()).view(value(node).shape)
    moved = numbers
    for view in reversed(chain):
        arguments, keywords = _numbers(list(view.args[1:])), _numbers(dict(view.kwargs))
        function = getattr(torch.Tensor, view.target) if isinstance(view.target, str) else view.target
        moved = function(moved, *arguments, **keywords)
    return node if moved.flatten().equal(numbers.flatten()) else None


def _numbers(item: Any) -> Any:
    """Arguments with what nodes stand for; a size that is a symbol becomes a number, and a guard."""
    if isinstance(item, dict):
        return {name: _numbers(each) for name, each in item.items()}
    if isinstance(item, list | tuple):
        return [_numbers(each) for each in item]
    item = value(item)
    return int(item) if isinstance(item, torch.SymInt) else item


def written_storages(graph: Graph) -> set[int]:
    """Storages that some node writes to in place: calls around such a write can't be moved together."""
    written: set[int] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if not node.op.startswith("call"):
            continue
        written |= {storage(each) for each in _written_by_op(node)}
        if _IN_PLACE.fullmatch(name) or node.kwargs.get("inplace"):
            first = node.args[0] if node.args else None
            written |= {storage(each) for each in (first if isinstance(first, list | tuple) else [first])}
        if "out" in node.kwargs:
            written.add(storage(node.kwargs["out"]))
    return written - {0}


def _written_by_op(node: Node) -> list[Node]:
    """What a custom op says it changes; a higher-order op may change everything it is given."""
    if is_higher_order(node.target):
        return node.all_input_nodes
    schema = schema_of(node.target)
    if schema is None or not schema.is_mutable:
        return []
    named = named_arguments(node, (each.name for each in schema.arguments))
    found: list[Node] = []
    for each in schema.arguments:
        if each.alias_info is not None and each.alias_info.is_write:
            map_arg(named.get(each.name), found.append)
    return found


def storage(node: object) -> int:
    """What tells the storage of a node's fake value from others; 0 when it has none."""
    example = value(node)
    return storage_id(example) if isinstance(example, torch.Tensor) else 0

"""Attention of one new token that turns q and k by its position itself, and stores what a static cache gets.

before   q, k', v = …                                                  parts of one `was.gather_gemv`, by head
         q = q * cos + cat(-q[D/2:], q[:D/2]) * sin; k' alike
         position = arange(1) + length                                   or a graph input
         k.index_copy_(2, position, k'); v.index_copy_(2, position, v')  k, v: graph inputs
         y, index, count = was.decode_attention(q, k, v, mask, scale, [t…], counters)
after    y, index, count = was.rotary_attention(partial, [start…], [bias…], cos, sin, length, k, v, mask, …)

The length is one of the cache's counters, which is advanced after the attention then.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.kernels.ops.decode_attention import decode_attention_op
from was_fx.kernels.ops.rotary_attention import fake, rotary_attention_op
from was_fx.passes.graph.context import Context, Part, value
from was_fx.passes.graph.matching import (
    arguments_of,
    either_order,
    flattening_of,
    is_view,
    kind,
    named_arguments,
    storage,
    written_storages,
)

Sharing = Mapping[int, Sequence[Node]]


@dataclass(frozen=True)
class Turned:
    """x · cos + rotate_half(x) · sin."""

    x: Node
    cos: Node
    sin: Node


@dataclass(frozen=True)
class Stored:
    """What a node writes to a cache, and where."""

    write: Node
    position: Node
    new: Node


@dataclass(frozen=True)
class Rotary:
    """What `was::rotary_attention` takes in place of q; `writes` are the nodes that it makes needless, `advances` those
    that change the position."""

    parts: tuple[Part, Part, Part]
    cos: Node
    sin: Node
    position: Node
    writes: tuple[Node, Node]
    advances: tuple[Node, ...]


def match(context: Context, node: Node, sharing: Sharing, written: Collection[int]) -> Rotary | str:
    """What an attention node and those before it compute, or why they are left alone; `sharing` are the nodes of each
    storage, `written` the storages written in place."""
    q, k, v = arguments_of(node)[:3]
    heads, width = value(q).shape[1], value(q).shape[3]
    if not statically_known_true(value(q).shape[0] == 1) or width % 2:
        return "it is not one token of one sequence, with heads of even width"
    turned_q = _turned(q)
    stored_k, stored_v = (_stored(context, cache, node, sharing) for cache in (k, v))
    if stored_k is None or stored_v is None or stored_k.position is not stored_v.position:
        return "its keys and values are not stored by one index_copy_ each"
    turned_k = _turned(stored_k.new)
    if turned_q is None or turned_k is None:
        return "its queries and keys are not turned as Llama's"
    if (turned_q.cos, turned_q.sin) != (turned_k.cos, turned_k.sin):
        return "its queries and keys are turned differently"
    # Of a view Inductor would make a copy for each block.
    cos, sin = (flattening_of(each, lambda node: not is_view(node)) for each in (turned_q.cos, turned_q.sin))
    if cos is None or sin is None:
        return "its queries and keys are turned by numbers in another order"
    dtype = value(k).dtype
    if {value(each).dtype for each in (turned_q.x, turned_q.cos, turned_q.sin, stored_v.new, v)} != {dtype}:
        return "its numbers are of several dtypes"
    parts = []
    for x, size in ((turned_q.x, heads), (turned_k.x, value(k).shape[1]), (stored_v.new, value(k).shape[1])):
        origin = flattening_of(x, context.parts.__contains__)
        if origin is None or context.parts[origin].size != size * width:
            return "its queries, keys and values are not outputs of Linears"
        parts.append(context.parts[origin])
    if len({part.partial for part in parts}) != 1:
        return "its queries, keys and values are not outputs of one product"
    computed = (q, stored_k.new, turned_q.x, turned_k.x, stored_v.new, turned_q.cos, turned_q.sin)
    if {storage(each) for each in computed} & set(written):
        return "they are written in place"
    found = _position(context, stored_k.position, node, sharing)
    if isinstance(found, str):
        return found
    position, advances = found
    writes = stored_k.write, stored_v.write
    return Rotary((parts[0], parts[1], parts[2]), cos, sin, position, writes, advances)


def fuse_rotary(context: Context) -> None:
    """Rewrite every attention of `fuse_attention` whose queries and keys are turned by their position."""
    graph = context.module.graph
    nodes = graph.find_nodes(op="call_function", target=decode_attention_op)
    if not nodes:
        return
    written = written_storages(graph)
    sharing: dict[int, list[Node]] = defaultdict(list)
    for each in graph.nodes:
        sharing[storage(each)].append(each)
    for node, found in context.matches(nodes, lambda node: match(context, node, sharing, written)):
        _rewrite(context, node, found)
        context.counts["fused rotary embeddings"] += 1


def _turned(node: Any) -> Turned | None:
    """What `node` turns by its position, in the manner of Llama; None where it does not."""
    if kind(node) != "add" or value(node).shape[-1] % 2:
        return None
    for plain, rotated in either_order(node):
        if kind(plain) != "mul" or kind(rotated) != "mul":
            continue
        for x, cos in either_order(plain):
            for half, sin in either_order(rotated):
                if _rotates(half, x) and _is_row(cos, x) and _is_row(sin, x):
                    return Turned(x, cos, sin)
    return None


def _rotates(node: Any, x: Any) -> bool:
    """Whether `node` is cat(-x[..., D/2:], x[..., :D/2])."""
    if kind(node) not in ("cat", "concat") or not isinstance(x, Node):
        return False
    given = named_arguments(node, ("tensors", "dim"))
    if given.get("dim", 0) not in (-1, value(node).dim() - 1) or len(given["tensors"]) != 2:
        return False
    negative, first = given["tensors"]
    if kind(negative) != "neg":
        return False
    middle = value(x).shape[-1] // 2
    return _is_slice(negative.args[0], x, middle, None) and _is_slice(first, x, None, middle)


def _is_slice(node: Any, x: Node, start: int | None, stop: int | None) -> bool:
    return kind(node) == "getitem" and node.args == (x, (Ellipsis, slice(start, stop, None)))


def _is_row(node: Any, x: Node) -> bool:
    """Whether `node` has one number for each column of x."""
    return isinstance(node, Node) and statically_known_true(value(node).numel() == value(x).shape[-1])


def _stored(context: Context, cache: Any, reader: Node, sharing: Sharing) -> Stored | None:
    """What is put into a cache before `reader` reads it; None unless that is all that happens to it."""
    if not context.is_input(cache) or storage(cache) == 0:
        return None
    writes = [each for each in sharing[storage(cache)] if each is not cache]
    if len(writes) != 1 or kind(writes[0]) != "index_copy_" or set(cache.users) != {writes[0], reader}:
        return None
    (write,) = writes
    given = named_arguments(write, ("input", "dim", "index", "source"))
    if write.users or given.get("dim") != 2 or value(given["index"]).numel() != 1 or not write < reader:
        return None
    return Stored(write, given["index"], given["source"])


def _position(context: Context, node: Node, reader: Node, sharing: Sharing) -> tuple[Node, tuple[Node, ...]] | str:
    """The graph input that says where the new token is, and the nodes that change it; or why none does."""
    if kind(node) == "add":
        for zero, counter in either_order(node):
            if kind(zero) == "arange" and zero.args in ((1,), (0, 1)) and context.is_input(counter):
                node = counter
                break
    if not context.is_input(node) or value(node).numel() != 1 or storage(node) == 0:
        return "where it stores keys and values is computed"
    same = sharing[storage(node)]
    reads = {user for each in same for user in each.users}
    advances = [each for each in same if kind(each) == "add_"]
    if any(each.users or each.args[0] is not node for each in advances) or any(
        kind(each).endswith("_") for each in {*same, *reads} - set(advances)
    ):
        return "where it stores keys and values is changed in more ways than one"
    advances = [each for each in advances if each < reader]
    if any(advance < each < reader for advance in advances for each in reads):
        return "where it stores keys and values is read again"
    return node, tuple(advances)


def _rewrite(context: Context, node: Node, found: Rotary) -> None:
    q, k, v, mask, scale, thresholds, counters = arguments_of(node)
    starts, biases = [part.start for part in found.parts], [part.bias for part in found.parts]
    with context.module.graph.inserting_before(node):
        arguments = (found.parts[0].partial, starts, biases, found.cos, found.sin, found.position)
        rest = (k, v, mask, scale, value(q).shape[1], thresholds, counters)
        results = context.fused(rotary_attention_op, fake, (*arguments, *rest))
    if counters.args[0] is q:
        counters.args = (found.parts[0].partial,)
    for each in found.advances:
        node.append(each)
    context.replace_outputs(node, results)
    for each in found.writes:
        context.module.graph.erase_node(each)
        for argument in each.all_input_nodes:
            context.erase_unused(argument)
    context.erase_unused(q)

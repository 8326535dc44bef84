"""Attention of one new token by a kernel that skips what the mask hides, shares keys among heads, and lists its output.

before   k_ = k[:, :, None].expand(1, KV, n, L, D).reshape(1, H, L, D)       k [1, KV, L, D]; v alike
         y = scaled_dot_product_attention(q, k_, v_, attn_mask=mask, scale=scale)     q [1, H, 1, D]
         x = y.transpose(1, 2).reshape(1, 1, H·D)
         index, count = was.compact(x, [t…])
after    counters = was.arrivals(q)     once in a graph
         y, index, count = was.decode_attention(q, k, v, mask, scale, [t…], counters)
         x = y.transpose(1, 2).reshape(1, 1, H·D)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.decode_attention import decode_attention_op, fake
from was_fx.passes.graph.context import Context, value
from was_fx.passes.graph.counters import counters_before
from was_fx.passes.graph.matching import (
    arguments_of,
    flattening_of,
    kind,
    named_arguments,
    same_shape,
    storage,
    written_storages,
)

_SDPA = "scaled_dot_product_attention"
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_DEFAULTS = (None, None, None, None, 0.0, False, None)
# Wider heads need more shared memory than a program has.
MAX_WIDTH = 256


@dataclass(frozen=True)
class Attention:
    """The arguments of `was::decode_attention`."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float


def match(node: Node) -> Attention | str:
    """What an attention node computes, or why it is left alone."""
    given = named_arguments(node, _NAMES)
    values: list[Any] = [given.get(name, default) for name, default in zip(_NAMES, _DEFAULTS, strict=True)]
    q, k, v, mask, dropout, causal, scale = values
    if dropout or causal:
        return "attention with dropout, or causal by position"
    if isinstance(scale, Node):
        return "its scale is an input of the graph"  # as under dynamic=True, where Dynamo takes floats for unknown
    if value(q).dim() != 4 or not statically_known_true(value(q).shape[2] == 1):
        return "more than one query"
    k, v = _unrepeated(k), _unrepeated(v)
    width = int(value(q).shape[-1])  # a guard, where it was not known
    if value(k).shape[-1] != width or value(v).shape[-1] != width or value(k).shape[1] != value(v).shape[1]:
        return "keys and values of different width"
    if width > MAX_WIDTH:
        return f"heads wider than {MAX_WIDTH}"
    if not statically_known_true(value(k).shape[0] == value(q).shape[0]):
        return "queries share keys across the batch"
    if mask is not None:
        shape = value(mask).shape
        whole = len(shape) == 4 and shape[1] == 1 and statically_known_true(shape[2] == 1)
        whole = whole and statically_known_true(shape[3] == value(k).shape[2])
        if value(mask).dtype != torch.bool or not whole:
            return "a mask that is not [B, 1, 1, L] bool"
    return Attention(q, k, v, _unexpanded(mask), width**-0.5 if scale is None else float(scale))


def fuse_attention(context: Context) -> None:
    """Rewrite every attention of one query in a decode step whose channels are listed."""
    if not context.parts:
        return
    graph = context.module.graph
    lists = graph.find_nodes(op="call_function", target=compact_op)
    written = written_storages(graph)
    readers = {flattening_of(x, {_SDPA}): each for each in lists if storage(x := each.args[0]) not in written}
    for node, found in context.matches([each for each in graph.nodes if kind(each) == _SDPA], match):
        _rewrite(context, node, found, readers.get(node))
        context.counts["decode attention"] += 1


def _unrepeated(node: Any) -> Any:
    """k [B, KV, L, D] when `node` is its heads repeated to [B, H, L, D]."""
    if kind(node) not in ("reshape", "view") or kind(node.args[0]) != "expand":
        return node
    inner = node.args[0].args[0]
    if kind(inner) not in ("getitem", "unsqueeze"):
        return node
    base, repeated = inner.args[0], value(node.args[0])
    if not isinstance(base, Node) or value(base).dim() != 4 or repeated.dim() != 5:
        return node
    batch, shared, length, width = value(base).shape
    shapes = [
        (value(inner).shape, (batch, shared, 1, length, width)),
        (value(node).shape, (batch, shared * repeated.shape[2], length, width)),
    ]
    return base if all(same_shape(*each) for each in shapes) else node


def _unexpanded(mask: Node | None) -> Node | None:
    """The mask that an expansion to its own shape is of; of the expansion Inductor would make a copy for each block."""
    while isinstance(mask, Node) and kind(mask) == "expand":
        base: Any = mask.args[0]
        if not same_shape(value(base).shape, value(mask).shape):
            break
        mask = base
    return mask


def _rewrite(context: Context, node: Node, found: Attention, reader: Node | None) -> None:
    thresholds = list(arguments_of(reader)[1]) if reader is not None else []
    counters = counters_before(context, node, found.q)
    with context.module.graph.inserting_before(node):
        arguments = (found.q, found.k, found.v, found.mask, found.scale, thresholds, counters)
        y, index, count = context.fused(decode_attention_op, fake, arguments)
    context.replace(node, y)
    if reader is not None:
        context.replace_outputs(reader, (index, count))
        context.counts["fused attention lists"] += 1
    context.erase_unused(node)

"""Let an RMSNorm add the Linear before it to the residual stream, and list the channels of its output.

    before   o = (partial.sum(0) + b).to(dtype).view(1, 1, K)       what `list_channels` left of a Linear
             h = residual + o
             h32 = h.to(float32)
             x = weight * (h32 * rsqrt(h32.pow(2).mean(-1, keepdim=True) + eps)).to(dtype)
             index, count = was.compact(x, [t…])
    after    h, x, index, count = was.rms_norm_compact(residual, partial, b, weight, [t…], eps, "cast_first")

The product with the weight may also come before the cast, or be (1 + weight). When h is no such sum, it is the residual
and there is no partial. A norm of such a sum whose output is not listed, as before experts, lists nothing: t… is empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from was_fx.compat.graphs import is_erased
from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.rms_norm_compact import fake, rms_norm_compact_op
from was_fx.passes.graph.context import Context, Part, value
from was_fx.passes.graph.matching import (
    arguments_of,
    dtype_of,
    either_order,
    kind,
    named_arguments,
    storage,
    without_casts,
    written_storages,
)


@dataclass(frozen=True)
class RMSNorm:
    """x = norm(h), with the arguments of `was::rms_norm_compact`."""

    h: Node
    weight: Node
    eps: float
    style: str


def match(context: Context, x: Node) -> RMSNorm | str:
    """The norm that computes `x`, or why there is none."""
    if kind(x) == "rms_norm":
        names = ("input", "normalized_shape", "weight", "eps")
        given = named_arguments(x, names)
        h, shape, weight, eps = (given.get(name) for name in names)
        if h is None or weight is None or eps is None or len(shape or ()) != 1:
            return "rms_norm without a weight or eps"
        if not context.is_input(weight):
            return "the norm's weight is not a parameter [K]"
        return RMSNorm(h, weight, eps, "cast_last")
    product = without_casts(x)
    if kind(product) != "mul":
        return "its input is not an RMSNorm"
    for scale, normalised in either_order(product):
        found = _standardised(without_casts(normalised))
        if found is None:
            continue
        h, eps = found
        weight, offset = _weight(scale)
        if weight is None:
            return "the norm rounds in another place"
        if not context.is_input(weight) or value(weight).shape != value(x).shape[-1:]:
            return "the norm's weight is not a parameter [K]"
        rounded = dtype_of(normalised) == dtype_of(x)
        late = dtype_of(product) == torch.float32
        if dtype_of(x) != dtype_of(h) or (offset and not late) or not (rounded or late):
            return "the norm rounds in another place"
        style = "unit_offset" if offset else "cast_first" if rounded else "cast_last"
        return RMSNorm(h, weight, eps, style)
    return "its input is not an RMSNorm"


def fuse_rms_norms(context: Context) -> None:
    """Rewrite every listing whose input is an RMSNorm."""
    written = written_storages(context.module.graph)

    def unwritten(listed: Node) -> RMSNorm | str:
        norm = match(context, arguments_of(listed)[0])
        found = isinstance(norm, RMSNorm) and {storage(norm.h), storage(listed.args[0])} & written
        return "it is written in place" if found else norm

    lists = context.module.graph.find_nodes(op="call_function", target=compact_op)
    for listed, norm in context.matches(lists, unwritten):
        x, thresholds = arguments_of(listed)
        lists_of_x = _rewrite(context, x, thresholds, norm, _linear_before(context, norm, written))
        context.replace_outputs(listed, lists_of_x)
        _erase(context, x, norm)
    for x in list(context.module.graph.nodes):
        alone = None if is_erased(x) or not x.users else match(context, x)
        if not isinstance(alone, RMSNorm):
            continue
        before = _linear_before(context, alone, written)
        if before is not None and value(alone.h).numel() == value(x).shape[-1] and storage(x) not in written:
            _rewrite(context, x, [], alone, before)
            _erase(context, x, alone)


def _weight(scale: Any) -> tuple[Any, bool]:
    """The weight, None where it is rounded on the way, and whether 1 is added to it."""
    added = without_casts(scale)
    if kind(added) == "add":
        for one, cast in either_order(added):
            if one == 1:
                exact = dtype_of(added) == dtype_of(scale) == torch.float32 and not _narrowed(cast)
                return without_casts(cast) if exact else None, True
    return None if _narrowed(scale) else added, False


def _narrowed(node: Any) -> bool:
    """Whether casts have rounded what `node` is."""
    before, after = dtype_of(without_casts(node)), dtype_of(node)
    return before is not None and after is not None and torch.promote_types(before, after) != after


def _standardised(node: Any) -> tuple[Node, float] | None:
    """(h, eps) when `node` is h · rsqrt(mean(h²) + eps)."""
    if kind(node) != "mul":
        return None
    for h32, root in either_order(node):
        if kind(root) != "rsqrt" or kind(root.args[0]) != "add" or dtype_of(h32) != torch.float32:
            continue
        for mean, eps in either_order(root.args[0]):
            if isinstance(eps, float) and kind(mean) == "mean" and _square(mean.args[0]) is h32 and _last(mean):
                return without_casts(h32), eps
    return None


def _square(node: Any) -> Any:
    """h when `node` is h²."""
    if kind(node) == "pow" and node.args[1] == 2:
        return node.args[0]
    if kind(node) == "square" or (kind(node) == "mul" and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _last(mean: Node) -> bool:
    """Whether a mean is over the last dimension, which it keeps."""
    shape = value(mean).shape
    return len(shape) == value(mean.args[0]).dim() and shape[-1] == 1 and mean.args[1:2] in ((-1,), ([-1],))


def _linear_before(context: Context, norm: RMSNorm, written: set[int]) -> tuple[Node, Part] | None:
    """(residual, the Linear's parts) when the norm is of their sum."""
    if kind(norm.h) != "add":
        return None
    for part, other in either_order(norm.h):
        found = context.parts.get(part)
        if found is None or found.size != value(found.partial).shape[-1]:
            continue
        if {storage(part), storage(norm.h)} & written:
            continue  # the sum is of what was written, such as the sum over ranks of tensor parallelism
        if dtype_of(other) == dtype_of(part) and value(other).shape == value(norm.h).shape:
            return other, found
    return None


def _rewrite(
    context: Context, x: Node, thresholds: Sequence[Node], norm: RMSNorm, before: tuple[Node, Part] | None
) -> list[Node]:
    """Let what reads the norm and its sum read the op's results; gives the list."""
    residual, part = (norm.h, None) if before is None else before
    partial, bias = (None, None) if part is None else (part.partial, part.bias)
    with context.module.graph.inserting_before(x if before is None else norm.h):
        arguments = (residual, partial, bias, norm.weight, thresholds, norm.eps, norm.style)
        h, normalised, index, count = context.fused(rms_norm_compact_op, fake, arguments)
    if before is not None:
        context.replace(norm.h, h)
    context.replace(x, normalised)
    context.counts["fused norms"] += 1
    return [index, count]


def _erase(context: Context, x: Node, norm: RMSNorm) -> None:
    for node in (x, norm.h):
        context.erase_unused(node)

"""Split each sparse Linear of a decode step on a GPU into the listing of kept channels, the product and its sum.

    before   y = was.sparse_siblings(x, [W…], [b…], [t…], None)         x [1, 1, K] -> y [1, 1, ΣN]
             q = narrow(y, -1, 0, Nq)                                     of merged siblings
    after    index, count = was.compact(x, [t…])                         [G, T, SEGMENT] and [G, T] int32
             partial = was.gather_gemv(x, index, count, [W…], S)         [S, 1, ΣN] fp32; of quantised ones
                                                                          was.gather_quantized_gemv
             q = (narrow(partial.sum(0), -1, 0, Nq) + bq).to(dtype).view(1, 1, Nq)

Of a few tokens, up to 16 of 16 bits, nothing is listed, for they keep nearly every channel between them:

    after    partial = was.masked_gemm(x, [W…], [t…], S)                 [S, ..., ΣN] fp32
             q = (narrow(partial.sum(0), -1, 0, Nq) + bq).to(dtype)

Later passes move the listing into what computes x, and the sum into what reads q. What they leave, Inductor fuses. A
slice of x that leaves nothing out, such as the last token of one before a head, is passed over.
"""

import math
import operator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from was_fx.kernels.linear.gather_gemv import gather_gemv_op
from was_fx.kernels.linear.gather_quantized_gemv import gather_quantized_gemv_op
from was_fx.kernels.linear.masked_gemm import DTYPES as MASKED_DTYPES
from was_fx.kernels.linear.masked_gemm import MAX_TOKENS, masked_gemm_config, masked_gemm_op
from was_fx.kernels.ops.compact import compact_op, empty_list
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.parts.triton_parts import DTYPES, MAX_SIBLINGS
from was_fx.passes.graph.context import Context, Part, SparseCall, quantised_parts, value
from was_fx.passes.graph.matching import arguments_of, without_slices


def declined(context: Context, call: SparseCall) -> str | None:
    """Why this call is left whole, or None."""
    x = value(call.x)
    if not (x.device.type == "cuda" if context.options.lists is None else context.options.lists):
        return "not on a GPU"
    if call.tokens is not None:
        return "some tokens keep every channel"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    tokens = math.prod(x.shape[:-1])
    if not statically_known_true(tokens == 1):
        if call.scales is not None or x.dtype not in MASKED_DTYPES:
            return "more than one token"
        if not statically_known_true(tokens > 0) or not guard_or_false(tokens <= MAX_TOKENS):
            return f"not 1 to {MAX_TOKENS} tokens"
    if context.has_gradients:
        return "it has gradients"
    return None


def list_channels(context: Context) -> None:
    """Rewrite the sparse calls of `context.calls`, and note each Linear's output in `context.parts`."""
    groups: dict[Node, list[SparseCall]] = {}
    for call in context.calls:
        groups.setdefault(call.node, []).append(call)
    for node, calls in groups.items():
        reason = declined(context, calls[0])
        if reason is not None:
            if reason != "not on a GPU":
                context.declined += [(call.name, f"channels are not listed: {reason}") for call in calls]
            continue
        outputs = [node] if len(calls) == 1 else sorted(node.users, key=lambda user: int(arguments_of(user)[2]))
        for first in range(0, len(calls), MAX_SIBLINGS):
            chosen = slice(first, first + MAX_SIBLINGS)
            _rewrite(context, node, calls[chosen], outputs[chosen])
        for output in reversed(outputs):
            context.module.graph.erase_node(output)
        if len(calls) > 1:
            context.module.graph.erase_node(node)
        context.erase_unused(calls[0].x)
        context.calls = [call for call in context.calls if call.node is not node]
        context.counts["listed"] += len(calls)


def _rewrite(context: Context, node: Node, calls: list[SparseCall], outputs: list[Node]) -> None:
    x = without_slices(calls[0].x)
    thresholds, sizes = [call.threshold for call in calls], [call.size for call in calls]
    one = statically_known_true(math.prod(value(x).shape[:-1]) == 1)
    product = _listed if one else _masked
    with context.module.graph.inserting_before(node):
        partial = product(context, x, calls, thresholds, sizes)
        partial.meta["was_linear"] = tuple(call.name for call in calls)
        total = context.call("sum", (partial, 0), value(partial).sum(0))
    start = 0
    for call, output, size in zip(calls, outputs, sizes, strict=True):
        part = Part(partial, start, size, call.bias)
        final = _finish(context, total, part, output, flat=one)
        context.parts[final] = part
        context.replace(output, final)
        start += size


def _listed(context: Context, x: Node, calls: list[SparseCall], thresholds: list[Node], sizes: list[int]) -> Node:
    """The parts of the product with the listed channels of one token."""
    weights, like = [call.weight for call in calls], value(x)
    op, stored, format = gather_gemv_op, [weights], like.dtype
    if calls[0].scales is not None:
        op, stored, format = gather_quantized_gemv_op, [weights, *quantised_parts(calls), thresholds], calls[0].format
    splits = gemv_config(like.device, format, int(like.shape[-1]), sizes).splits
    index, count = context.fused(compact_op, lambda x, thresholds: empty_list(x, len(thresholds)), (x, thresholds))
    parts = like.new_empty((splits, 1, sum(sizes)), dtype=torch.float32)
    return context.call(op, (x, index, count, *stored, splits), parts)


def _masked(context: Context, x: Node, calls: list[SparseCall], thresholds: list[Node], sizes: list[int]) -> Node:
    """The parts of the product of a few tokens."""
    weights, like = [call.weight for call in calls], value(x)
    splits = masked_gemm_config(like.device, int(like.shape[-1]), sizes).splits
    parts = like.new_empty((splits, *like.shape[:-1], sum(sizes)), dtype=torch.float32)
    return context.call(masked_gemm_op, (x, weights, thresholds, splits), parts)


def _finish(context: Context, total: Node, part: Part, output: Node, *, flat: bool) -> Node:
    """The Linear's output, from the sum of its parts, `flat` if that is [1, ΣN], in place of `output`."""
    like = value(output)
    with context.module.graph.inserting_before(output):
        example = torch.narrow(value(total), -1, part.start, part.size)
        node = context.call(torch.narrow, (total, -1, part.start, part.size), example)
        if part.bias is not None:
            node = context.call(operator.add, (node, part.bias), torch.empty_like(example))
        node = context.call("to", (node, like.dtype), example.to(like.dtype))
        if flat:
            node = context.call("view", (node, tuple(like.shape)), like)
    node.meta.update(output.meta)
    return node

"""Split each sparse Linear of a decode step on a GPU into the listing of kept channels and the product with them.

    before   y = was.sparse_linear(x, [W…], [b…], [t…], 1, 0)           x [1, 1, K] -> y [1, 1, ΣN]
             q = narrow(y, -1, 0, Nq)                                     of merged siblings
    after    index, count = was.compact(x, [t…])                         [G, T, SEGMENT] and [G, T] int32
             partial = was.gather_gemv(x, index, count, [W…], [t…], S)   [S, 1, ΣN] fp32
             q = (narrow(partial.sum(0), -1, 0, Nq) + bq).to(dtype).view(1, 1, Nq)

Later passes move the listing into what computes x, and the sum into what reads q. What they leave, Inductor fuses.
"""

import math
import operator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.kernels.linear.gather_gemv import gather_gemv_op
from was_fx.kernels.ops.compact import compact_op, empty_list
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.parts.triton_parts import DTYPES, MAX_SIBLINGS
from was_fx.passes.graph.context import Context, LinearSite, Part, value
from was_fx.passes.graph.matching import arguments_of


def declined(context: Context, node: Node) -> str | None:
    """Why this call is left whole, or None."""
    x = value(node.args[0])
    if not (x.device.type == "cuda" if context.options.lists is None else context.options.lists):
        return "not on a GPU"
    if context.phase != "decode":
        return "not a decode step"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if not statically_known_true(math.prod(x.shape[:-1]) == 1):
        return "more than one token"
    return None


def list_channels(context: Context) -> None:
    """Rewrite the sparse calls of `context.sites`, and note each Linear's output in `context.parts`."""
    calls: dict[Node, list[LinearSite]] = {}
    for site in context.sites:
        if site.sparse is not None:
            calls.setdefault(site.sparse.node, []).append(site)
    for node, sites in calls.items():
        reason = declined(context, node)
        if reason is not None:
            if reason != "not on a GPU":
                context.declined += [(site.name, f"channels are not listed: {reason}") for site in sites]
            continue
        outputs = [node] if len(sites) == 1 else sorted(node.users, key=lambda user: int(arguments_of(user)[2]))
        for first in range(0, len(sites), MAX_SIBLINGS):
            chosen = slice(first, first + MAX_SIBLINGS)
            _rewrite(context, node, sites[chosen], outputs[chosen])
        for output in reversed(outputs):
            context.module.graph.erase_node(output)
        if len(sites) > 1:
            context.module.graph.erase_node(node)
        context.counts["listed"] += len(sites)


def _rewrite(context: Context, node: Node, sites: list[LinearSite], outputs: list[Node]) -> None:
    graph, x = context.module.graph, node.args[0]
    calls = [site.sparse for site in sites if site.sparse is not None]
    weights, thresholds = [call.weight for call in calls], [call.threshold for call in calls]
    sizes = [int(value(weight).shape[0]) for weight in weights]
    like = value(x)
    splits = gemv_config(like.device, like.dtype, int(value(weights[0]).shape[1]), sizes).splits
    with graph.inserting_before(node):
        listed = graph.call_function(compact_op, (x, thresholds))
        listed.meta["example_value"] = empty_list(like, len(thresholds))
        index, count = context.outputs(listed, 2)
        partial = graph.call_function(gather_gemv_op, (x, index, count, weights, thresholds, splits))
        partial.meta["example_value"] = like.new_empty((splits, 1, sum(sizes)), dtype=torch.float32)
        partial.meta["was_linear"] = tuple(site.name for site in sites)
        total = graph.call_method("sum", (partial, 0))
        total.meta["example_value"] = value(partial).sum(0)
    start = 0
    for site, output, size in zip(sites, outputs, sizes, strict=True):
        part = Part(partial, start, size, site.bias)
        final = _finish(context, total, part, output)
        context.parts[final] = part
        context.replace(output, final)
        site.sparse = None
        start += size


def _finish(context: Context, total: Node, part: Part, output: Node) -> Node:
    """The Linear's output, from the sum of its parts, in place of `output`."""
    graph = context.module.graph
    with graph.inserting_before(output):
        node = graph.call_function(torch.narrow, (total, -1, part.start, part.size))
        node.meta["example_value"] = torch.narrow(value(total), -1, part.start, part.size)
        if part.bias is not None:
            node = graph.call_function(operator.add, (node, part.bias))
            node.meta["example_value"] = torch.empty_like(value(node.args[0]))
        node = graph.call_method("to", (node, value(output).dtype))
        node.meta["example_value"] = value(node.args[0]).to(value(output).dtype)
        node = graph.call_method("view", (node, tuple(value(output).shape)))
    node.meta.update(output.meta)
    return node

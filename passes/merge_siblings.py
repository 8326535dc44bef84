"""Merge sparse Linears that share their input into one call (q/k/v; gate/up; whatever else reads one tensor).

    before   q = was.sparse_linear(x, Wq, bq, tq, tokens)            x [..., K] -> q [..., Nq]
             k = was.sparse_linear(x, Wk, bk, tk, tokens)
    after    y = was.sparse_siblings(x, [Wq, Wk], [bq, bk], [tq, tk], tokens)         y [..., Nq + Nk]
             q = narrow(y, -1, 0, Nq)
             k = narrow(y, -1, Nq, Nk)

Each keeps its own thresholds. Quantised ones of one format are merged likewise, into `was.quantized_siblings`.
"""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch.fx import Node

from was_fx.kernels.linear.quantized_linear import quantized_siblings
from was_fx.kernels.linear.sparse_linear import sparse_siblings
from was_fx.passes.graph.context import Context, SparseCall, quantised_parts, value
from was_fx.passes.graph.matching import storage, view_of_input, written_storages


def declined(context: Context, call: SparseCall, written: Collection[int] = ()) -> str | None:
    """Why this call can't be merged with any other, or None; `written` are the storages written in place."""
    if call.bias is not None and not context.is_input(call.bias):
        return "its bias is computed in the graph"
    quantised = [each for each in (call.scales, call.groups) if each is not None]
    if view_of_input(context, call.weight) is None or not all(map(context.is_input, quantised)):
        return "its weight is computed in the graph"
    if not context.is_input(call.threshold):
        return "its threshold is computed in the graph"
    if storage(call.x) in written:
        return "its input is written in place"
    if context.has_gradients:
        return "it has gradients"
    return None


def merge_siblings(context: Context) -> None:
    """Merge every group of two or more."""
    groups: dict[tuple, list[SparseCall]] = defaultdict(list)
    written = written_storages(context.module.graph)
    for call in context.calls:
        reason = declined(context, call, written)
        if reason:
            context.declined.append((call.name, reason))
            continue
        groups[call.x, call.tokens, call.format, call.group].append(call)
    for group in groups.values():
        if len(group) > 1:
            _merge(context, group)
            context.counts["merged groups"] += 1
            context.counts["merged linears"] += len(group)


def _merge(context: Context, group: list[SparseCall]) -> None:
    graph = context.module.graph
    first = group[0].node
    with graph.inserting_before(first):
        weights = [_at_insertion_point(context, call.weight) for call in group]
        sizes = [call.size for call in group]
        biases, thresholds = [call.bias for call in group], [call.threshold for call in group]
        x, op, stored = value(group[0].x), sparse_siblings, [weights]
        if group[0].scales is not None:
            op, stored = quantized_siblings, [weights, *quantised_parts(group)]
        arguments = (group[0].x, *stored, biases, thresholds, group[0].tokens)
        merged = context.call(op, arguments, x.new_empty(*x.shape[:-1], sum(sizes)))
        merged.meta["was_linear"] = tuple(call.name for call in group)
        start = 0
        for call, size in zip(group, sizes, strict=True):
            part = graph.call_function(torch.narrow, (merged, -1, start, size))
            part.meta.update(call.node.meta)
            part.meta["example_value"] = torch.narrow(value(merged), -1, start, size)
            context.replace(call.node, part)
            start += size
    for call, weight in zip(group, weights, strict=True):
        graph.erase_node(call.node)
        if call.weight is not weight:
            context.erase_unused(call.weight)
        call.node, call.weight = merged, weight


def _at_insertion_point(context: Context, weight: Node) -> Node:
    """A weight, or the same view of it again."""
    return weight if context.is_input(weight) else context.module.graph.node_copy(weight)

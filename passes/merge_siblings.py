"""Merge sparse Linears that share their input into one call (q/k/v; gate/up; whatever else reads one tensor).

    before   q = was.sparse_linear(x, [Wq], [bq], [tq], S, d)        x [..., K] -> q [..., Nq]
             k = was.sparse_linear(x, [Wk], [bk], [tk], S, d)
    after    y = was.sparse_linear(x, [Wq, Wk], [bq, bk], [tq, tk], S, d)      y [..., Nq + Nk]
             q = narrow(y, -1, 0, Nq)
             k = narrow(y, -1, Nq, Nk)

Each keeps its own thresholds. The groups are listed in `context.siblings`, so that their weights can be laid one after
the other in one storage.
"""

from collections import defaultdict
from collections.abc import Collection

import torch

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.graph.context import Context, LinearSite, SparseCall, value, weight_view
from was_fx.passes.graph.matching import storage, written_storages

Sibling = tuple[LinearSite, SparseCall]


def declined(context: Context, site: LinearSite, written: Collection[int] = ()) -> str | None:
    """Why this sparse Linear can't be merged with any other, or None; `written` are the storages written in place."""
    if site.bias is not None and not context.is_input(site.bias):
        return "its bias is computed in the graph"
    if storage(site.x) in written:
        return "its input is written in place"
    return None


def merge_siblings(context: Context) -> None:
    """Merge every group of two or more."""
    groups: dict[tuple, list[Sibling]] = defaultdict(list)
    written = written_storages(context.module.graph)
    for site in context.sites:
        if site.sparse is None:
            continue
        reason = declined(context, site, written)
        if reason:
            context.declined.append((site.name, reason))
            continue
        groups[site.x, site.sparse.sequence, site.sparse.dense].append((site, site.sparse))
    for group in groups.values():
        if len(group) > 1:
            _merge(context, group)
            context.counts["merged groups"] += 1
            context.counts["merged linears"] += len(group)


def _merge(context: Context, group: list[Sibling]) -> None:
    graph = context.module.graph
    x, first = group[0][0].x, group[0][1]
    with graph.inserting_before(first.node):
        weights = [weight_view(graph, site) for site, _ in group]
        sizes = [value(weight).shape[0] for weight in weights]
        biases, thresholds = [site.bias for site, _ in group], [call.threshold for _, call in group]
        merged = graph.call_function(sparse_linear, (x, weights, biases, thresholds, first.sequence, first.dense))
        merged.meta["example_value"] = value(x).new_empty(*value(x).shape[:-1], sum(sizes))
        merged.meta["was_linear"] = tuple(site.name for site, _ in group)
        start = 0
        for (_, call), size in zip(group, sizes, strict=True):
            part = graph.call_function(torch.narrow, (merged, -1, start, size))
            part.meta.update(call.node.meta)
            part.meta["example_value"] = torch.narrow(value(merged), -1, start, size)
            context.replace(call.node, part)
            start += size
    for (site, call), weight in zip(group, weights, strict=True):
        graph.erase_node(call.node)
        if call.weight is not site.weight:
            graph.erase_node(call.weight)
        site.sparse = SparseCall(merged, weight, call.threshold, call.sequence, call.dense)
    context.siblings.append([(site.weight, site.binding) for site, _ in group if site.binding])

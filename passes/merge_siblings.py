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

import torch
from torch.fx import Node

from was_fx.kernels.sparse_linear import sparse_linear
from was_fx.passes.context import Context, LinearSite, value


def declined(context: Context, site: LinearSite) -> str | None:
    """Why this sparse Linear can't be merged with any other, or None."""
    if site.bias is not None and not context.is_input(site.bias):
        return "its bias is computed in the graph"
    return None


def merge_siblings(context: Context) -> None:
    """Merge every group of two or more."""
    groups: dict[tuple, list[LinearSite]] = defaultdict(list)
    for site in context.sites:
        if site.sparse is None:
            continue
        reason = declined(context, site)
        if reason:
            context.declined.append((site.binding.name if site.binding else str(site.path), reason))
            continue
        x, *_, sequence, dense = site.sparse.args
        groups[x, sequence, dense].append(site)
    for group in groups.values():
        if len(group) > 1:
            _merge(context, group)
            context.counts["merged groups"] += 1
            context.counts["merged linears"] += len(group)


def _merge(context: Context, group: list[LinearSite]) -> None:
    graph = context.module.graph
    first = group[0].sparse
    assert first is not None
    x, *_, sequence, dense = first.args
    with graph.inserting_before(first):
        weights = [_weight(context, site) for site in group]
        thresholds = [site.sparse.args[3][0] for site in group]
        merged = graph.call_function(
            sparse_linear,
            (x, weights, [site.bias for site in group], thresholds, sequence, dense),
        )
        sizes = [value(weight).shape[0] for weight in weights]
        merged.meta["example_value"] = value(x).new_empty(*value(x).shape[:-1], sum(sizes))
        merged.meta["was_linear"] = tuple(site.sparse.meta["was_linear"] for site in group)
        start = 0
        for site, size in zip(group, sizes, strict=True):
            part = graph.call_function(torch.narrow, (merged, -1, start, size))
            part.meta.update(site.sparse.meta)
            part.meta["example_value"] = torch.narrow(value(merged), -1, start, size)
            site.sparse.replace_all_uses_with(part)
            start += size
    for site in group:
        _erase(graph, site.sparse)
        site.sparse = merged
    context.siblings.append([(site.weight, site.binding) for site in group if site.binding])


def _weight(context: Context, site: LinearSite) -> Node:
    """W [N, K] at the insertion point."""
    if not site.input_major:
        return site.weight
    node = context.module.graph.call_method("t", (site.weight,))
    node.meta["example_value"] = value(site.weight).t()
    return node


def _erase(graph: torch.fx.Graph, sparse: Node) -> None:
    weights = [node for node in sparse.args[1] if node.op != "placeholder"]
    graph.erase_node(sparse)
    for node in weights:
        graph.erase_node(node)

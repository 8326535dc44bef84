"""Rewrite every scheduled Linear of a dense model's graph into a sparse one, for a schedule given as a backend option.

    before   y = linear(x, W, b)                              x [..., K], W [N, K], b [N] -> y [..., N]
    after    t = was.channel_threshold(W, τ, α, p, False)     t [K] fp32; a constant where no norm is needed
             y = was.sparse_linear(x, W, b, t, None)

The backend sees a graph, not the model's call, so a decode step is told by its shapes: one new token per sequence, and
a cache among the inputs wherever there is attention. The graph of a prompt stays dense, unless prompts are sparse too;
on a CPU its scheduled Linears become `was.dense_linear`, which multiplies by weights that lie by input channel.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.compat.dynamo import add_constant, like_in_graph, source_name
from was_fx.kernels.linear.dense_linear import dense_linear
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.ops.channel_threshold import channel_threshold_op
from was_fx.passes.graph.context import Context, Numbers, value
from was_fx.passes.graph.errors import RewriteError
from was_fx.passes.graph.linear_sites import LinearSite, linear_sites
from was_fx.passes.graph.matching import kind

_FLATTENS = {"view", "reshape", "flatten", "contiguous", "to", "type_as"}
_CACHES = ("past_key_values", "cache")
_ATTENTION = {"scaled_dot_product_attention", "softmax"}


def declined(site: LinearSite, numbers: Numbers) -> str | None:
    """Why this Linear can't be rewritten, or None."""
    shape = tuple(value(site.weight).shape)
    shape = shape[::-1] if site.input_major else shape
    if shape != numbers.shape:
        return f"the schedule is for shape {numbers.shape}, the model has {shape}"
    if value(site.x).dtype != value(site.weight).dtype:
        return f"x is {value(site.x).dtype} and its weight {value(site.weight).dtype}"
    if value(site.node).dtype != value(site.x).dtype:
        return f"autocast makes its output {value(site.node).dtype} from {value(site.x).dtype}"
    return None


def insert(context: Context) -> None:
    """Rewrite the Linears that `context.options.schedule` names.

    Raises:
        RewriteError: lists every Linear of the schedule that the graph has not, or that can't be rewritten.
    """
    schedule = context.options.schedule
    if schedule is None:
        return
    every = linear_sites(context)
    sites = [(site.path, site) for site in every if site.path is not None and site.path in schedule]
    found = {name for name, _ in sites}
    problems = {name: "no Linear of the graph has this name" for name in schedule if name not in found}
    reasons = [(name, declined(site, schedule[name])) for name, site in sites]  # a Linear may be called twice
    problems |= {name: reason for name, reason in reasons if reason is not None}
    if problems:
        raise RewriteError("the schedule does not fit the compiled graph", problems)
    context.weights = list(dict.fromkeys(context.position(site.weight) for _, site in sites if not site.input_major))
    if not context.options.sparse_prompts and not _is_decode_step(context, every):
        context.counts["dense (prompt)"] = len(sites)
        sites = [each for each in sites if not each[1].input_major and value(each[1].x).device.type == "cpu"]
        _for_each(sites, lambda number, name, site: _rewrite_dense(context, site))
        return
    _for_each(sites, lambda number, name, site: _rewrite(context, site, schedule[name], number))
    context.counts["inserted"] += len(sites)


def _for_each(sites: list[tuple[str, LinearSite]], rewrite: Callable[[int, str, LinearSite], Node]) -> None:
    new: dict[Any, Node] = {}  # a Linear may read another's output
    for number, (name, site) in enumerate(sites):
        site = replace(site, x=new.get(site.x, site.x), bias=new.get(site.bias, site.bias))
        new[site.node] = rewrite(number, name, site)


def _rewrite_dense(context: Context, site: LinearSite) -> Node:
    """The dense op in place of a Linear."""
    graph = context.module.graph
    with graph.inserting_before(site.node):
        dense = graph.call_function(dense_linear, (site.x, site.weight, site.bias))
    dense.meta.update(site.node.meta)
    context.replace(site.node, dense)
    graph.erase_node(site.node)
    return dense


def _rewrite(context: Context, site: LinearSite, numbers: Numbers, number: int) -> Node:
    """The sparse Linear in place of a dense one."""
    graph = context.module.graph
    with graph.inserting_after(_last_input(graph, site.weight)):  # early: later passes list channels above the Linear
        threshold = _threshold(context, site, numbers, f"was_threshold_{number}")
    with graph.inserting_before(site.node):
        weight = site.weight
        if site.input_major:
            weight = context.call("t", (site.weight,), value(site.weight).t())
        sparse = graph.call_function(sparse_linear, (site.x, weight, site.bias, threshold, None))
    sparse.meta.update(site.node.meta)
    sparse.meta["was_linear"] = site.path
    context.replace(site.node, sparse)
    graph.erase_node(site.node)
    return sparse


def _last_input(graph: Graph, weight: Node) -> Node:
    """The node after which the weight is known: the graph's last input, unless the weight is computed."""
    return weight if weight.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]


def _threshold(context: Context, site: LinearSite, numbers: Numbers, name: str) -> Node:
    if numbers.channel_threshold is None and numbers.exponent:
        example = value(site.weight).new_empty(numbers.shape[1], dtype=torch.float32)
        arguments = (site.weight, numbers.threshold, numbers.exponent, numbers.norm, site.input_major)
        return context.call(channel_threshold_op, arguments, example)
    tensor = numbers.channel_threshold
    if tensor is None:
        tensor = torch.full((numbers.shape[1],), numbers.threshold)
    add_constant(context.module, name, tensor.to(context.input_of(site.weight).device, torch.float32))
    node = context.module.graph.get_attr(name)
    node.meta["example_value"] = like_in_graph(getattr(context.module, name), context.module)
    return node


def _is_decode_step(context: Context, sites: list[LinearSite]) -> bool:
    """One new token per sequence for most Linears (a head may see only the last token of a prompt, and a Linear may
    read all cached tokens in each step), and a past, where there is attention."""
    sources = [_sequence_source(site.x) for site in sites]
    lengths = [value(source).shape[-2] for source in sources if source is not None]
    if not lengths:  # no x shows its sequences: [M, K], [K], or one row for each head
        lengths = [math.prod(value(site.x).shape[:-1]) for site in sites]
    single = sum(statically_known_true(length == 1) for length in lengths)
    if not (2 * single > len(lengths) or single == len(lengths)):
        return False
    graph = context.module.graph
    cached = any(
        any(f"['{name}']" in source_name(node) or f".{name}" in source_name(node) for name in _CACHES)
        for node in graph.find_nodes(op="placeholder")
        if isinstance(value(node), torch.Tensor) and value(node).is_floating_point()
    )
    return cached or not any(kind(node) in _ATTENTION for node in graph.nodes)


def _sequence_source(x: Node) -> Node | None:
    """The tensor [B, S, K] that x is, or that x [M, K] is a flattening of; None when it can't be seen."""
    node: Any = x
    while isinstance(node, Node) and isinstance(value(node), torch.Tensor):
        if value(node).dim() > 2:
            whole = value(node).dim() == 3 and statically_known_true(value(node).shape[-1] == value(x).shape[-1])
            return node if whole else None
        if node.op != "call_method" or node.target not in _FLATTENS:
            return None
        node = node.args[0]
    return None

"""Split each product with chosen experts of a decode step on a GPU into the listing of kept channels and the product.

    before   y = was.sparse_experts(x, W, b, t, experts, None)           x [R, K], W [E, N, K], experts [S] -> y [S, N]
    after    index, count = was.compact_experts(x, t, experts)           [S, T, SEGMENT] and [S, T] int32
             partial = was.gather_experts(x, index, count, W, experts, I)                 [I, S, N] fp32
                                                                      of quantised ones was.gather_quantized_experts
             y = (partial.sum(0) + b[experts]).to(dtype)

Inductor fuses the sum with what lies between the products, and that after the second with the weights of the experts.
"""

from typing import Any

import torch
from torch.fx import Node

from was_fx.kernels.linear.gather_experts import (
    MAX_PAIRS,
    gather_experts_op,
    gather_quantized_experts_op,
    quantized_config,
)
from was_fx.kernels.linear.gpu_experts import finish
from was_fx.kernels.ops.compact import empty_list
from was_fx.kernels.ops.compact_experts import compact_experts_op
from was_fx.kernels.parts.gemv_config import experts_config
from was_fx.kernels.parts.triton_parts import DTYPES
from was_fx.passes.find_sparse_calls import EXPERTS
from was_fx.passes.graph.context import Context, value
from was_fx.passes.graph.matching import named_arguments


def expert_calls(context: Context) -> list[tuple[Node, dict[str, Any]]]:
    """The sparse products with experts of a graph, and the arguments of each by name."""
    nodes = [node for node in context.module.graph.nodes if node.op == "call_function" and node.target in EXPERTS]
    found = [(node, named_arguments(node, EXPERTS[node.target])) for node in nodes]
    return [(node, given) for node, given in found if given["threshold"] is not None]


def declined(context: Context, given: dict[str, Any]) -> str | None:
    """Why this product is left whole, or None."""
    x, pairs = value(given["x"]), value(given["experts"]).shape[0]
    if not (x.device.type == "cuda" if context.options.lists is None else context.options.lists):
        return "not on a GPU"
    if given.get("tokens") is not None:
        return "some tokens keep every channel"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if not isinstance(pairs, int) or pairs > MAX_PAIRS:
        return f"{pairs} pairs of a token and an expert"
    if context.has_gradients:
        return "it has gradients"
    return None


def list_expert_channels(context: Context) -> None:
    """Rewrite the products with experts of a decode step."""
    for node, given in expert_calls(context):
        reason = declined(context, given)
        if reason is not None:
            if reason != "not on a GPU":
                context.declined.append((str(given["weight"]), f"channels are not listed: {reason}"))
            continue
        _rewrite(context, node, given)
        context.counts["listed"] += 1


def _rewrite(context: Context, node: Node, given: dict[str, Any]) -> None:
    x, weight, threshold, experts = (given[name] for name in ("x", "weight", "threshold", "experts"))
    like, pairs = value(x), int(value(experts).shape[0])
    outputs = value(node).shape[1]
    op, stored = gather_experts_op, [weight]
    if "scales" in given:
        op, stored = gather_quantized_experts_op, [weight, given["scales"], given["groups"]]
        held: list[Any] = [None if each is None else value(each) for each in stored]
        codes, scales, groups = held
        splits = quantized_config(like, codes, scales, groups, value(experts)).splits
    else:
        splits = experts_config(like.device, like.dtype, int(like.shape[1]), int(outputs), pairs).splits
    with context.module.graph.inserting_before(node):
        index, count = context.fused(
            compact_experts_op, lambda x, _, experts: empty_list(x, experts.shape[0]), (x, threshold, experts)
        )
        parts = like.new_empty((splits, pairs, outputs), dtype=torch.float32)
        partial = context.call(op, (x, index, count, *stored, experts, splits), parts)
        total = context.call("sum", (partial, 0), parts.sum(0))
        example = like.new_empty((pairs, outputs))
        final = context.call(finish, (total, given.get("bias"), experts, like.dtype), example)
    final.meta.update({key: each for key, each in node.meta.items() if key not in final.meta})
    context.replace(node, final)
    context.module.graph.erase_node(node)

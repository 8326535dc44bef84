"""Let a decode step's routers be one kernel, from their input to the experts that they choose.

before   logits = linear(x, W, b)                                x [..., K], W [E, K], few rows on a GPU
         scores = softmax(logits, -1, dtype=float32)             or softmax(logits.float(), -1); or the logits
         values, index = torch.topk(scores, k, dim=-1)
after    counters = was.arrivals(x)     once in a graph
         logits, values, index = was.route(x, W, b, k, True, counters)
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from was_fx.kernels.ops.route import fake, fits, route_op
from was_fx.passes import replace_topk
from was_fx.passes.graph.context import Context, value
from was_fx.passes.graph.counters import counters_before
from was_fx.passes.graph.matching import dtype_of, kind, named_arguments, storage, without_casts, written_storages


@dataclass(frozen=True)
class Router:
    """The arguments of `was::route`, and the node of its logits."""

    logits: Node
    x: Node
    weight: Node
    bias: Node | None
    k: int
    softmax: bool


def match(context: Context, scores: Node, k: int, written: set[int]) -> Router | str:
    """The router that ends in a torch.topk of `scores`, or why there is none; `written` are the storages written in
    place."""
    logits = _before_softmax(scores) if kind(scores) == "softmax" else scores
    if isinstance(logits, str):
        return logits
    if kind(logits) != "linear":
        return "the topk is not of a Linear, or of its softmax"
    given = named_arguments(logits, ("input", "weight", "bias"))
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    parameters = [weight] if bias is None else [weight, bias]
    # The kernel reads W before those before it have ended.
    if not all(context.is_input(each) and type(context.input_of(each)) is nn.Parameter for each in parameters):
        return "the router's weight or bias is not a parameter"
    if {storage(each) for each in (x, logits, scores, *parameters)} & written:
        return "the router's input, weight, logits or scores are written in place"
    if not fits(value(x), value(weight), value(bias), k):
        return "the router is of other sizes, dtypes or strides than the kernel takes"
    return Router(logits, x, weight, bias, k, scores is not logits)


def _before_softmax(scores: Node) -> Node | str:
    """The logits whose softmax in fp32 `scores` is, or why it is none."""
    if len(scores.users) > 1:
        return "the scores are read by more than the topk"
    given = named_arguments(scores, ("input", "dim"))
    x = given["input"]
    if given.get("dim") not in (-1, value(scores).dim() - 1):
        return "the softmax is not over the last dimension"
    if dtype_of(scores) != torch.float32:
        return "the softmax is not in fp32"
    logits = without_casts(x)
    if x is not logits and (dtype_of(x) != torch.float32 or x.args[0] is not logits):
        return "the logits are rounded before the softmax"
    return logits


def fuse_routers(context: Context) -> None:
    """Rewrite every router of a decode step whose channels are listed."""
    if not context.counts["listed"]:
        return
    written = written_storages(context.module.graph)
    found_topks = {
        node: replace_topk.match(context, node) for node in context.module.graph.nodes if kind(node) == "topk"
    }
    topks = {node: topk for node, topk in found_topks.items() if not isinstance(topk, str)}  # that pass says why
    for node, found in context.matches([*topks], lambda node: match(context, *topks[node], written)):
        counters = counters_before(context, found.logits, found.x)
        with context.module.graph.inserting_before(found.logits):
            arguments = (found.x, found.weight, found.bias, found.k, found.softmax, counters)
            logits, *outputs = context.fused(route_op, fake, arguments)
        context.replace(found.logits, logits)
        context.replace_outputs(node, outputs)
        for each in (node, found.logits, logits):
            context.erase_unused(each)
        context.counts["fused routers"] += 1

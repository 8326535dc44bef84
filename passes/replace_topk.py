"""Let a decode step's routers choose their experts by one kernel, where torch.topk takes two, and longer.

before   values, index = torch.topk(x, k, dim=-1)                   x [..., E], few rows on a GPU
after    values, index = was.few_topk(x, k)
"""

import operator

from torch.fx import Node

from was_fx.kernels.ops.few_topk import fake, few_topk_op, fits
from was_fx.passes.graph.context import Context, value
from was_fx.passes.graph.matching import kind, named_arguments


def match(context: Context, node: Node) -> tuple[Node, int] | str:
    """(x, k) of a torch.topk that the kernel takes, or why it does not."""
    given = named_arguments(node, ("input", "k", "dim", "largest", "sorted"))
    x, k = given.get("input"), given.get("k")
    example = value(x)
    if not isinstance(x, Node) or not isinstance(k, int) or not all(isinstance(n, int) for n in example.shape):
        return "sizes of the topk are not known"
    if not (example.device.type == "cuda" if context.options.lists is None else context.options.lists):
        return "the topk is not on a GPU"
    if context.has_gradients:
        return "the topk has gradients"
    if any(user.target is not operator.getitem for user in node.users):
        return "the topk's results are read as one"
    if given.get("dim", -1) not in (-1, example.dim() - 1) or given.get("largest", True) is not True:
        return "the topk is not of the largest of the last dimension"
    if not fits(example, k):
        return "the topk is of other numbers than a few short rows"
    return x, k


def replace_topk(context: Context) -> None:
    """Rewrite every torch.topk of a decode step whose channels are listed."""
    if not context.counts["listed"]:
        return
    nodes = [node for node in context.module.graph.nodes if kind(node) == "topk"]
    for node, (x, k) in context.matches(nodes, lambda node: match(context, node)):
        with context.module.graph.inserting_before(node):
            outputs = context.fused(few_topk_op, fake, (x, k))
        context.replace_outputs(node, outputs)
        context.erase_unused(node)
        context.counts["chosen"] += 1

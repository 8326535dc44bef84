"""Advance all counters of a step in one kernel: a static cache has one in every layer.

before   position = arange + length_0              length_i [] int64, graph inputs
         length_0.add_(1)
         … length_1.add_(1)
after    position = arange + length_0
         … was.advance([length_0, length_1, …], 1)
"""

from collections import defaultdict

from torch.fx import Node

from was_fx.kernels.ops.advance import advance_op
from was_fx.passes.graph.context import Context, value
from was_fx.passes.graph.matching import arguments_of, kind, storage


def declined(context: Context, node: Node) -> str | None:
    """Why this `add_` is no counter, or None."""
    counter, *others = arguments_of(node)
    if not context.is_input(counter) or value(counter).dim() != 0 or value(counter).is_floating_point():
        return "it adds to more than a counter"
    if len(others) != 1 or not isinstance(others[0], int) or node.kwargs:
        return "what it adds is not constant"
    if node.users or any(
        user > node or storage(user) == storage(counter) != 0 for user in counter.users if user is not node
    ):
        return "its result is read in the graph"
    return None


def batch_counters(context: Context) -> None:
    """Rewrite the counters of a decode step whose channels are listed."""
    if not context.parts:
        return
    groups: dict[int, list[Node]] = defaultdict(list)
    for node in context.module.graph.nodes:
        if node.op == "call_method" and kind(node) == "add_" and declined(context, node) is None:
            groups[node.args[1]].append(node)
    for step, nodes in groups.items():
        if len(nodes) < 2:
            continue
        with context.module.graph.inserting_after(nodes[-1]):
            context.module.graph.call_function(advance_op, ([node.args[0] for node in nodes], step))
        for node in nodes:
            context.module.graph.erase_node(node)
        context.counts["batched counters"] += len(nodes)

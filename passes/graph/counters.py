"""The counters of `kernels/parts/arrivals.py`, of which a graph has one tensor on each device."""

from torch.fx import Node

from was_fx.kernels.parts.arrivals import arrivals, arrivals_op
from was_fx.passes.graph.context import Context, value


def counters_before(context: Context, node: Node, like: Node) -> Node:
    """Counters on the device of `like`, an argument of what is put before `node`."""
    graph = context.module.graph
    for made in graph.find_nodes(op="call_function", target=arrivals_op):
        if value(made).device == value(like).device:
            if node < made:
                node.prepend(made)
                made.args = (like,)
            return made
    with graph.inserting_before(node):
        return context.call(arrivals_op, (like,), arrivals(value(like)))

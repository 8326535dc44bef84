"""Count dropped channels beside every sparse Linear, for realised sparsity.

    before   y = was.sparse_linear(x, [W], [b], [t], S, d)
    after    was.count_dropped(x, t, counts, S, d)               counts [2] int64, a new graph input, mutated
             y = was.sparse_linear(x, [W], [b], [t], S, d)

Runs only with the option `observe`.
"""

from was_fx.kernels.ops.count_dropped import count_dropped as count_dropped_op
from was_fx.passes.graph.context import Context


def count_dropped(context: Context) -> None:
    """Insert a counter before each sparse Linear."""
    if not context.options.observe:
        return
    graph = context.module.graph
    for site in context.sites:
        if site.sparse is None or site.binding is None:
            continue
        call = site.sparse
        counts = context.extra_input(site, "counts")
        with graph.inserting_before(call.node):
            graph.call_function(count_dropped_op, (site.x, call.threshold, counts, call.sequence, call.dense))
        context.counts["observed"] += 1

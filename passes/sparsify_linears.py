"""Replace each scheduled Linear by a sparse one.

    before   y = linear(x, W, b)                                  x [..., K], W [N, K], b [N] -> y [..., N]
    after    y = was.sparse_linear(x, [W], [b], [t], S, d)        t [K] fp32, a new graph input

S is the number of tokens per sequence and d how many of them, at the start of a prompt, keep every channel. The
graph of a prompt stays dense when the option `prefill` is "dense".
"""

import math
import operator
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.graph.choose_phase import sequence_source
from was_fx.passes.graph.context import Context, LinearSite, SparseCall, value, weight_view
from was_fx.passes.graph.errors import RewriteError


def declined(context: Context, site: LinearSite) -> str | None:
    """Why this Linear is left alone, or None."""
    if site.binding is None:
        return "not in the schedule"
    if context.phase == "prefill" and context.options.prefill == "dense":
        return "prompts stay dense"
    if value(site.x).dtype != value(site.weight).dtype:
        return f"x is {value(site.x).dtype} and its weight {value(site.weight).dtype}"
    if value(site.node).dtype != value(site.x).dtype:
        return f"autocast makes its output {value(site.node).dtype} from {value(site.x).dtype}"
    return None


def sparsify_linears(context: Context) -> None:
    """Rewrite the Linears of `context.sites`.

    Raises:
        RewriteError: a scheduled Linear can't be rewritten although it should be sparse in this graph.
    """
    token_range = _TokenRange(context)
    problems: dict[str, str] = {}
    for site in context.sites:
        reason = declined(context, site)
        if reason is None:
            _rewrite(context, site, *token_range(site))
            context.counts["sparsified"] += 1
            continue
        context.declined.append((site.name, reason))
        if site.binding is None:
            context.counts["dense (not scheduled)"] += 1
        elif reason == "prompts stay dense":
            context.counts["dense (prompt)"] += 1
        else:
            problems[site.name] = reason
    if problems:
        raise RewriteError(
            "scheduled Linears could not be rewritten:\n  "
            + "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
            + "\nrun the model in one dtype, or leave these Linears out of the schedule",
            problems,
        )


def _rewrite(context: Context, site: LinearSite, sequence: Node | int, dense: Node | int) -> None:
    graph = context.module.graph
    threshold = context.extra_input(site, "threshold")
    with graph.inserting_before(site.node):
        weight = weight_view(graph, site)
        sparse = graph.call_function(
            sparse_linear,
            (site.x, [weight], [site.bias], [threshold], sequence, dense),
        )
    sparse.meta.update(site.node.meta)
    context.replace(site.node, sparse)
    graph.erase_node(site.node)
    site.sparse = SparseCall(sparse, weight, threshold, sequence, dense)


class _TokenRange:
    """(tokens per sequence, leading dense tokens) of each Linear, computed in the graph once, where needed."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.nodes: tuple[Node | int, Node | int] | None = None
        self.length: Any = None
        self.rows: Any = None

    def __call__(self, site: LinearSite) -> tuple[Node | int, Node | int]:
        if self.context.phase == "decode" or self.context.options.prefill == "all":
            return 1, 0
        source = sequence_source(site.x)
        if source is not None and self.nodes is None:
            self.length = value(source).shape[-2]
            self.rows = math.prod(value(source).shape[:-1])
            self.nodes = self._compute(source)
        if source is not None and not statically_known_true(value(source).shape[-2] == self.length):
            return 1, 0  # only the last tokens of the prompt came this far
        flat = source is None and not statically_known_true(math.prod(value(site.x).shape[:-1]) == self.rows)
        if self.nodes is None or flat:
            raise RewriteError(
                f"{site.name}: can't tell the sequences of its input {tuple(value(site.x).shape)} apart, as "
                f"prefill={self.context.options.prefill!r} needs; use prefill='dense' or 'all'"
            )
        return self.nodes

    def _compute(self, source: Node) -> tuple[Node, Node]:
        graph, length = self.context.module.graph, self.length
        with graph.inserting_after(source):
            sequence = graph.call_method("size", (source, -2))
        sequence.meta["example_value"] = length
        # "sparse": the first 1 %, rounded up. "half": the first half, rounded up.
        add, divisor = (99, 100) if self.context.options.prefill == "sparse" else (1, 2)
        with graph.inserting_after(sequence):
            raised = graph.call_function(operator.add, (sequence, add))
        raised.meta["example_value"] = length + add
        with graph.inserting_after(raised):
            dense = graph.call_function(operator.floordiv, (raised, divisor))
        dense.meta["example_value"] = (length + add) // divisor
        return sequence, dense

"""Find the sparse Linears of a graph: each call of `was.sparse_linear`. The graph is unchanged.

y = was.sparse_linear(x, W, b, t, tokens)        x [..., K], W [N, K], b [N], t [K] fp32 -> y [..., N]
"""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.passes.graph.context import Context, SparseCall, module_path, value

_NAMES = ("x", "weight", "bias", "threshold", "tokens")


def find_sparse_calls(context: Context) -> None:
    """Fill `context.calls` and `context.decode`."""
    for node in context.module.graph.nodes:
        # Dynamo writes the packet; a graph that was traced further, the overload.
        if node.op == "call_function" and node.target in (
            torch.ops.was.sparse_linear,
            torch.ops.was.sparse_linear.default,
        ):
            given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
            x, weight, bias, threshold, tokens = (given[name] for name in _NAMES)
            name = node.meta.get("was_linear") or module_path(node) or str(weight)
            context.calls.append(SparseCall(node, x, weight, bias, threshold, tokens, name))
    lengths = [value(call.x).shape[-2] if value(call.x).dim() > 1 else 1 for call in context.calls]
    # Of most: a head may see only the last token of a prompt, and a Linear may read all cached tokens in each step.
    context.decode = 2 * sum(statically_known_true(length == 1) for length in lengths) > len(lengths)
    context.counts["sparse"] = len(context.calls)

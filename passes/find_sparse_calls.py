"""Find the sparse Linears of a graph, each call of one of two ops. The graph is unchanged.

y = was.sparse_linear(x, W, b, t, tokens)                   x [..., K], W [N, K], b [N], t [K] fp32 -> y [..., N]
y = was.quantized_linear(x, codes, scales, groups, b, t, tokens)           W as `QuantizedRows`; dense without t
"""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.kernels.linear.quantized_experts import quantized_experts
from was_fx.kernels.linear.quantized_linear import quantized_linear
from was_fx.kernels.linear.sparse_experts import sparse_experts
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.graph.context import Context, SparseCall, module_path, value
from was_fx.passes.graph.matching import named_arguments

_NAMES = ("x", "weight", "bias", "threshold", "tokens")
_QUANTIZED = ("x", "weight", "scales", "groups", "bias", "threshold", "tokens")

# Dynamo writes the packet; a graph that was traced further, the overload.
_OPS = {
    torch.ops.was.sparse_linear: _NAMES,
    sparse_linear: _NAMES,
    torch.ops.was.quantized_linear: _QUANTIZED,
    quantized_linear: _QUANTIZED,
}
_OF_EXPERTS = ("x", "weight", "bias", "threshold", "experts", "tokens")
_OF_QUANTIZED_EXPERTS = ("x", "weight", "scales", "groups", "bias", "threshold", "experts", "tokens")
EXPERTS = {
    torch.ops.was.sparse_experts: _OF_EXPERTS,
    sparse_experts: _OF_EXPERTS,
    torch.ops.was.quantized_experts: _OF_QUANTIZED_EXPERTS,
    quantized_experts: _OF_QUANTIZED_EXPERTS,
}


def find_sparse_calls(context: Context) -> None:
    """Fill `context.calls` and `context.decode`."""
    for node in context.module.graph.nodes:
        names = _OPS.get(node.target) if node.op == "call_function" else None
        if names is None:
            continue
        given = named_arguments(node, names)
        given = {("weight" if name == "codes" else name): argument for name, argument in given.items()}
        if given["threshold"] is None:
            continue
        name = node.meta.get("was_linear") or module_path(node) or str(given["weight"])
        context.calls.append(SparseCall(node, name=name, **{each: given[each] for each in names}))
    experts = [node for node in context.module.graph.nodes if node.op == "call_function" and node.target in EXPERTS]
    lengths = [value(call.x).shape[-2] if value(call.x).dim() > 1 else 1 for call in context.calls]
    # Of most: a head may see only the last token of a prompt, and a Linear may read all cached tokens in each step.
    context.decode = 2 * sum(statically_known_true(length == 1) for length in lengths) > len(lengths)
    if not lengths:  # experts see the tokens of all sequences in one row
        lengths = [value(node.args[0]).shape[0] for node in experts]
        context.decode = any(statically_known_true(length == 1) for length in lengths)
    context.counts["sparse"] = len(context.calls) + len(experts)

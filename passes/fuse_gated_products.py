"""Let SwiGLU, GeGLU and the like add the parts of gate and up, and list the channels of their product.

    before   gate, up = …                                              parts of one `was.gather_gemv`
             x = silu(gate) * up
             index, count = was.compact(x, [t])
    after    x, index, count = was.gated_product_compact(partial, [gate_start, up_start], [bg, bu], t, "silu", dtype)

gate and up may be two Linears or the halves of one.
"""

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.gated_product_compact import fake, gated_product_compact_op
from was_fx.passes.graph.context import Context, Part, value
from was_fx.passes.graph.matching import arguments_of, either_order, kind, storage, written_storages

_ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid"}


def match(context: Context, listed: Node, written: Collection[int] = ()) -> tuple[str, Part, Part] | str:
    """(activation, gate, up) of a listing's input, or why it is no gated product; `written` are the storages written
    in place."""
    x, thresholds = arguments_of(listed)
    if kind(x) != "mul" or not isinstance(x, Node):
        return "its input is not a gated product"
    for activated, linear in either_order(x):
        name = kind(activated)
        if name not in _ACTIVATIONS:
            continue
        if name == "gelu" and activated.kwargs.get("approximate") == "tanh":
            name = "gelu_tanh"
        gate, up = _part(context, activated.args[0]), _part(context, linear)
        if gate is None or up is None or gate.partial is not up.partial:
            return "gate and up are not read from one product"
        if not gate.size == up.size == value(x).shape[-1]:
            return "gate and up are of different width"
        if {storage(each) for each in (x, activated, activated.args[0], linear)} & set(written):
            return "it is written in place"
        if len(thresholds) != 1:
            return "more than one Linear reads the gated product"
        return name, gate, up
    return "its input is not a gated product"


def fuse_gated_products(context: Context) -> None:
    """Rewrite every listing whose input is a gated product."""
    written = written_storages(context.module.graph)
    lists = context.module.graph.find_nodes(op="call_function", target=compact_op)
    for listed, found in context.matches(lists, lambda listed: match(context, listed, written)):
        _rewrite(context, listed, *found)
        context.counts["fused gated products"] += 1


def _part(context: Context, node: Any) -> Part | None:
    """The part that `node` is, or the half of one that it takes by chunk or split."""
    if node in context.parts:
        return context.parts[node]
    if kind(node) != "getitem" or kind(node.args[0]) not in ("chunk", "split"):
        return None
    whole = context.parts.get(node.args[0].args[0])
    if whole is None or whole.bias is not None or value(node).shape[:-1].numel() != 1:
        return None
    start = sum(piece.shape[-1] for piece in value(node.args[0])[: node.args[1]])
    return Part(whole.partial, whole.start + start, value(node).shape[-1], None)


def _rewrite(context: Context, listed: Node, activation: str, gate: Part, up: Part) -> None:
    x, (threshold,) = arguments_of(listed)
    starts, biases = [gate.start, up.start], [gate.bias, up.bias]
    with context.module.graph.inserting_before(x):
        arguments = (gate.partial, starts, biases, threshold, activation, value(x).dtype)
        flat, index, count = context.fused(gated_product_compact_op, fake, arguments)
        shaped = context.call("view", (flat, tuple(value(x).shape)), value(flat).view(value(x).shape))
    context.replace(x, shaped)
    context.replace_outputs(listed, (index, count))
    context.erase_unused(x)

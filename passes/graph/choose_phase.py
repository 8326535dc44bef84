"""Decode or prefill, by the number of new tokens per sequence that the graph was traced for.

Dynamo never generalises a size of 1, so a decode step is a graph of its own and this is known at compile time. The
whole graph has one phase, that of most of its Linears: a head that sees only the last token of a prompt belongs to the
prompt, and a Linear that reads all cached tokens in each step (Doge) belongs to the decode step.
"""

import math
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from was_fx.passes.graph.context import Context, value

_FLATTENS = {"view", "reshape", "flatten", "contiguous", "to", "type_as"}


def choose_phase(context: Context) -> None:
    """Set `context.phase`."""
    sources = [sequence_source(site.x) for site in context.sites]
    lengths = [value(source).shape[-2] for source in sources if source is not None]
    if not lengths:  # no x shows its sequences: [M, K], [K], or one row for each head
        lengths = [math.prod(value(site.x).shape[:-1]) for site in context.sites]
    single = sum(statically_known_true(length == 1) for length in lengths)
    decode = 2 * single > len(lengths) or single == len(lengths)
    context.phase = "decode" if decode else "prefill"
    context.counts[context.phase] = 1


def sequence_source(x: Node) -> Node | None:
    """The tensor [B, S, K] that x is, or that x [M, K] is a flattening of; None when it can't be seen."""
    node: Any = x
    while isinstance(node, Node) and isinstance(value(node), torch.Tensor):
        if value(node).dim() > 2:
            whole = value(node).dim() == 3 and statically_known_true(value(node).shape[-1] == value(x).shape[-1])
            return node if whole else None
        if node.op != "call_method" or node.target not in _FLATTENS:
            return None
        node = node.args[0]
    return None

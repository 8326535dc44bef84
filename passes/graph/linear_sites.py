"""Find every Linear of a dense graph.

    y = linear(x, W, b)              W [N, K]     nn.Linear, F.linear
    y = addmm(b, x, W)               W [K, N]     transformers' Conv1D
    y = matmul(x, W.T)               W [N, K]     Linear subclasses that write the product out

The transpose may be .T, .mT, t, transpose, swapaxes, swapdims or permute, a method or a function.

W must be a graph input: a weight that was computed (cast, dequantised, gathered) is left alone.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from was_fx.compat.dynamo import linear_function
from was_fx.passes.graph.context import Context, module_path, value


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One use of a Linear's weight in the graph.

    Attributes:
        node: computes y.
        x: [..., K].
        weight: graph input, [N, K], or [K, N] when `input_major`.
        bias: [N], or None.
        input_major: see `weight`.
        path: dotted path of its module, relative to the compiled one, as far as Dynamo knows it.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    input_major: bool
    path: str | None


Match = tuple[Any, Any, Any, bool]  # x, weight, bias, weight is [K, N]


def _linear(node: Node) -> Match | None:
    x, weight, bias = _arguments(node, "input", "weight", "bias")
    return x, weight, bias, False


def _addmm(node: Node) -> Match | None:
    if node.kwargs or len(node.args) != 3:
        return None
    bias, x, weight = node.args
    return x, weight, bias, True


def _matmul(node: Node) -> Match | None:
    if "out" in node.kwargs:
        return None
    x, right = _arguments(node, "input", "mat2" if "mat2" in node.kwargs else "other")
    weight = _transposed(right)
    return None if weight is None else (x, weight, None, False)


def _arguments(node: Node, *names: str) -> list[Any]:
    """Arguments in the order of `names`, however they were passed; None for a missing one."""
    return [*node.args, *(node.kwargs.get(name) for name in names[len(node.args) :])]


def _transposed(node: object) -> Any:
    """W [N, K], when `node` is its transpose written in any of the usual ways."""
    if not isinstance(node, Node) or not node.args:
        return None
    if node.target is getattr:
        return node.args[0] if node.args[1] in ("T", "mT") else None
    if node.target in _TRANSPOSES:
        return node.args[0]
    dims = _dims([*node.args[1:], *node.kwargs.values()])
    if node.target in _SWAPS and sorted(dims) == [0, 1]:
        return node.args[0]
    return node.args[0] if node.target in _PERMUTATIONS and dims == [1, 0] else None


def _dims(arguments: list[Any]) -> list[int]:
    """Dimensions of a matrix, counted from its first; empty when they are not constants."""
    flat = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list | tuple) else arguments
    return [dim % 2 for dim in flat] if all(isinstance(dim, int) for dim in flat) else []


_TRANSPOSES = {"t", torch.t}
_SWAPS = {"transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims}
_PERMUTATIONS = {"permute", torch.permute}

_MATCHERS: dict[object, Callable[[Node], Match | None]] = {
    linear_function: _linear,
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "mm": _matmul,
}


def linear_sites(context: Context) -> list[LinearSite]:
    """Every Linear of the graph, in order."""
    found = []
    for node in context.module.graph.nodes:
        matcher = _MATCHERS.get(node.target) if node.op in ("call_function", "call_method") else None
        match = matcher(node) if matcher else None
        if match is None:
            continue
        x, weight, bias, input_major = match
        if context.is_input(weight) and len(_shape(weight)) == 2:
            found.append(LinearSite(node, x, weight, bias, input_major, module_path(node)))
    return found


def _shape(node: Node) -> tuple[int, ...]:
    example = value(node)
    return tuple(example.shape) if isinstance(example, torch.Tensor) else ()

"""Find every Linear in the graph and tie it to its schedule entry.

    y = linear(x, W, b)              W [N, K]     nn.Linear, F.linear
    y = addmm(b, x, W)               W [K, N]     transformers' Conv1D
    y = matmul(x, W.T)               W [N, K]     Linear subclasses that write the product out
    y = linear(x, W.to_local(), b)   W DTensor    tensor parallelism: x, W and y are this rank's parts

The transpose may be .T, .mT, t, transpose, swapaxes, swapdims or permute, a method or a function.

W must be a graph input: a weight that was computed (cast, dequantised, gathered) is left alone. The graph is unchanged;
the Linears are listed in `context.sites`.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from was_fx.passes.bindings import bindings, resolve
from was_fx.passes.graph.context import Context, LinearSite, module_path, value
from was_fx.passes.graph.errors import RewriteError

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


def _whole(weight: object) -> tuple[Any, Node | None]:
    """(DTensor, its local part), when `weight` is the local part of one; (weight, None) otherwise."""
    if isinstance(weight, Node) and _is_to_local(weight) and not weight.args[1:] and not weight.kwargs:
        return weight.args[0], weight
    return weight, None


def _is_to_local(node: Node) -> bool:
    # torch 2.11's Dynamo puts a function of its own in place of the method, made anew for every call.
    return node.target == "to_local" or "method_to_local." in getattr(node.target, "__qualname__", "")


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
    torch._C._nn.linear: _linear,
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "mm": _matmul,
}


def recognize_linears(context: Context) -> None:
    """Fill `context.sites`.

    Raises:
        RewriteError: a scheduled weight is used, and no use of it was recognised; names it and the use.
    """
    for node in context.module.graph.nodes:
        matcher = _MATCHERS.get(node.target) if node.op in ("call_function", "call_method") else None
        match = matcher(node) if matcher else None
        if match is None:
            continue
        x, weight, bias, input_major = match
        weight, shard = _whole(weight)
        if not context.is_input(weight) or len(_shape(weight)) != 2:
            continue
        path = module_path(node)
        binding = resolve(context.input_of(weight), path)
        context.sites.append(LinearSite(node, x, weight, bias, input_major, path, binding, shard))
        node.meta["was_linear"] = binding.name if binding else path
    context.counts["linears"] = len(context.sites)
    context.counts["scheduled"] = sum(site.binding is not None for site in context.sites)
    _require_all_recognised(context)


def _require_all_recognised(context: Context) -> None:
    """Every scheduled weight in the graph must have been seen as a Linear (an embedding may share it)."""
    seen = {site.binding.name for site in context.sites if site.binding}
    problems: dict[str, str] = {}
    for placeholder in context.module.graph.find_nodes(op="placeholder"):
        if not context.is_input(placeholder):
            continue
        uses = [user for user in placeholder.users if user.target is not torch.nn.functional.embedding]
        if not uses:
            continue
        problems |= {
            name: f"its weight is used by {', '.join(str(user.target) for user in uses)}"
            for name in bindings(context.input_of(placeholder))
            if name not in seen and not _other_use_seen(context, placeholder)
        }
    if problems:
        raise RewriteError(
            "scheduled Linears were not recognised in the graph:\n  "
            + "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
            + "\nexpected linear(x, W, b), addmm(b, x, W) or matmul(x, W.T) with W a parameter; "
            "leave these Linears out of the schedule",
            problems,
        )


def _other_use_seen(context: Context, placeholder: Node) -> bool:
    """A shared weight may be compiled under only some of its names."""
    return any(site.weight is placeholder and site.binding for site in context.sites)


def _shape(node: Node) -> tuple[int, ...]:
    example = value(node)
    return tuple(example.shape) if isinstance(example, torch.Tensor) else ()

"""What each operator of a recorded step is as instructions (`program.Step`)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import cpu_gather, cpu_quantized, dense_linear
from was_fx.kernels.linear.quantized_linear import quantized_linear
from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.parts.private_names import CPU_ATTENTION, SOFTMAX, operator_name
from was_fx.kernels.quantized.rows import QuantizedRows
from was_fx.kernels.record.program import Step, Unsupported, View, elementwise

aten = torch.ops.aten

# Products whose first argument is the input.
LINEARS = (sparse_linear, quantized_linear, dense_linear.dense_linear)

# (operator's arguments, keyword arguments, its result) -> its instructions.
Translation = Callable[[tuple[Any, ...], dict[str, Any], Any], Iterable[Step]]

_UNARY = {
    "neg": "neg",
    "abs": "abs",
    "relu": "relu",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "reciprocal": "reciprocal",
    "exp": "exp",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
    "logical_not": "not",
    "clone": "copy",
    "_to_copy": "copy",
}
_BINARY = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "maximum": "maximum",
    "minimum": "minimum",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "logical_and": "and",
    "logical_or": "or",
}
# Of bools these are the logical ones.
_BITWISE = {"bitwise_not": "not", "bitwise_and": "and", "bitwise_or": "or"}
# Exponents that are operations of their own.
_POWERS = {2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


def translate(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> list[Step]:
    """The instructions of one call.

    Args:
        operator: an `OpOverload` that writes; one that only gives a view needs no instruction.
        arguments, keywords: its own.
        out: its result, a tensor or several.

    Raises:
        Unsupported: there are none.
    """
    found = _TRANSLATIONS.get(operator)
    if found is None:
        name = operator_name(operator).removesuffix("_")
        found = _by_name(name, arguments)
    if found is None:
        raise Unsupported(f"the operator {operator}")
    return list(found(arguments, keywords, out))


def _by_name(name: str, arguments: tuple[Any, ...]) -> Translation | None:
    if name in _BITWISE and arguments[0].dtype == torch.bool:
        return _elementwise(_BITWISE[name])
    if name in _UNARY or name in _BINARY:
        return _elementwise(_UNARY.get(name) or _BINARY[name])
    return None


def _elementwise(name: str) -> Translation:
    def steps(arguments: tuple[Any, ...], keywords: dict[str, Any], out: Tensor) -> Iterable[Step]:
        if keywords.get("rounding_mode") is not None:
            raise Unsupported("a division that rounds")
        count = 1 if name in _UNARY.values() else 2
        inputs = [_tensor(each, out, arguments) for each in arguments[:count]]
        alpha = keywords.get("alpha", 1) if name in ("add", "sub") else 0
        yield elementwise(name, out, inputs, float(alpha))

    return steps


def _tensor(value: Any, out: Tensor, others: Iterable[Any] = ()) -> Tensor:
    """A number as torch counts with it beside tensors: exactly among integers, in fp32 else."""
    if isinstance(value, Tensor):
        return value
    floating = any(isinstance(each, Tensor) and each.is_floating_point() for each in (out, *others))
    return torch.tensor(value, dtype=torch.float32 if floating else torch.float64)


def _power(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    if arguments[1] not in _POWERS:
        raise Unsupported(f"the power {arguments[1]}")
    yield elementwise(_POWERS[arguments[1]], out, arguments[:1])


def _gelu(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    name = "gelu_tanh" if keywords.get("approximate", "none") == "tanh" else "gelu"
    yield elementwise(name, out, arguments[:1])


def _copy(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    yield elementwise("copy", arguments[0], [_tensor(arguments[1], out)])


def _where(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    condition, first, second = arguments
    yield elementwise("where", out, [condition, _tensor(first, out), _tensor(second, out)])


def _masked_fill(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, mask, value = arguments
    yield elementwise("where", out, [mask, _tensor(value, out), x])


def _clamp(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, low, high = (*arguments, None, None)[:3]
    low, high = keywords.get("min", low), keywords.get("max", high)
    for name, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            yield elementwise(name, out, [x, _tensor(bound, out)])
            x = out


def _concatenate(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    parts, dimension = arguments[0], (arguments[1] if len(arguments) > 1 else keywords.get("dim", 0))
    begin = 0
    for part in parts:
        if part.ndim != out.ndim:  # an empty one of one dimension
            continue
        size = part.shape[dimension]
        if size:
            yield elementwise("copy", out.narrow(dimension, begin, size), [part])
        begin += size


def _over_last(name: str) -> Translation:
    def steps(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
        x, dimensions = arguments[0], arguments[1]
        if [d % x.ndim for d in dimensions] != [x.ndim - 1]:
            raise Unsupported(f"{name} over another dimension than the last")
        strides = out.stride() if out.ndim == x.ndim else (*out.stride(), 0)
        yield Step(name, View(out, strides), [View(x)], tuple(x.shape))

    return steps


def _softmax(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, dimension = arguments[:2]
    if dimension % x.ndim != x.ndim - 1:
        raise Unsupported("softmax over another dimension than the last")
    yield Step("softmax", View(out), [View(x)], tuple(x.shape))


def _layer_norm(arguments: Any, keywords: Any, out: Any) -> Iterable[Step]:
    x, shape, weight, bias, epsilon = arguments
    if len(shape) != 1:
        raise Unsupported("a layer norm over several dimensions")
    parts = [None if each is None else View(each.contiguous()) for each in (weight, bias)]
    yield Step("layer_norm", View(out[0]), [View(x), *parts], tuple(x.shape), epsilon)


def _embedding(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    weight, positions = arguments[:2]
    yield from _index_rows(weight, positions, out)


def _index_rows(table: Tensor, positions: Tensor, out: Tensor) -> Iterable[Step]:
    if not positions.is_contiguous() or not out.is_contiguous():
        raise Unsupported("positions that are not contiguous")
    rows = out.view(positions.numel(), *table.shape[1:])
    yield Step("index", View(rows), [View(table), View(positions)], tuple(rows.shape), integers=(0, table.shape[0]))


def _index_select(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, dimension, positions = arguments
    dimension %= x.ndim
    limits = dimension, x.shape[dimension]
    yield Step("index", View(out), [View(x), View(positions.contiguous())], tuple(out.shape), integers=limits)


def _index(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, indices = arguments[:2]
    dimension, positions = _single(indices)
    if dimension == 0:
        yield from _index_rows(x, positions, out)
    elif positions.ndim == 1:
        yield from _index_select((x, dimension, positions), keywords, out)
    else:
        raise Unsupported("positions of several dimensions")


def _single(indices: Any) -> tuple[int, Tensor]:
    given = [(d, each) for d, each in enumerate(indices) if each is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.int64, torch.int32):
        raise Unsupported("an index of several tensors, or of bools")
    return given[0]


def _index_copy(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    target, dimension, positions, source = arguments
    dimension %= target.ndim
    limits = dimension, target.shape[dimension]
    views = [View(source), View(positions.reshape(-1).contiguous())]
    yield Step("scatter", View(target), views, tuple(source.shape), integers=limits)


def _index_put(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    target, indices, source = arguments[:3]
    if len(arguments) > 3 and arguments[3]:
        raise Unsupported("an index_put that accumulates")
    dimension, positions = _single(indices)
    shape = (*target.shape[:dimension], positions.numel(), *target.shape[dimension + 1 :])
    if positions.ndim != 1:
        raise Unsupported("positions of several dimensions")
    yield from _index_copy((target, dimension, positions, source.expand(shape)), keywords, out)


def _matrices(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    a, b = arguments
    if a.ndim == 2:
        a, b, out = a[None], b[None], out[None]
    sizes = (a.shape[0], a.shape[1], b.shape[2], a.shape[2])
    yield Step("matrices", View(out), [View(a), View(b)], sizes)


def _mm(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, table = arguments
    if x.is_floating_point() and x.is_contiguous() and x.dtype in cpu_gather.DTYPES and _by_rows(table.t()):
        yield from _dense(x, table.t(), None, out)
    else:
        yield from _matrices(arguments, keywords, out)


def _addmm(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    bias, x, table = arguments
    if keywords.get("alpha", 1) != 1 or keywords.get("beta", 1) != 1 or bias.ndim != 1:
        raise Unsupported("an addmm that is no Linear")
    yield from _dense(x, table.t(), bias, out)


def _dense_linear(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, weight, bias = (*arguments, None)[:3]
    yield from _dense(x, weight, bias, out)


def _by_rows(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Iterable[Step]:
    if x.dtype not in cpu_gather.DTYPES or weight.dtype != x.dtype or not _by_rows(weight):
        raise Unsupported(f"a product of {x.dtype} with weights of {weight.dtype} whose rows are not contiguous")
    return _linear("gather" if weight.t().is_contiguous() else "all_rows", x, out, (weight, bias, None, None, None))


def _sparse_linear(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, weight, bias, threshold, tokens = arguments
    if tokens is not None or not cpu_gather.supports(x, (weight,)):
        raise Unsupported("a sparse product that is served as a dense one")
    yield from _linear("gather", x, out, (weight, bias, threshold, None, None))


def _quantized_linear(arguments: Any, keywords: Any, out: Tensor) -> Iterable[Step]:
    x, codes, scales, groups, bias, threshold, tokens = arguments
    rows = QuantizedRows(codes, scales, groups)
    if tokens is not None or not cpu_quantized.supports(x, (rows,)):
        raise Unsupported("a quantised product that is served by written-out weights")
    if groups is None:
        yield from _linear("gather_int8", x, out, (codes, bias, threshold, scales, None))
    else:
        group = rows.shape[0] // groups.shape[1]
        yield from _linear("gather_int4", x, out, (codes, bias, threshold, scales, groups), group)


def _linear(name: str, x: Tensor, out: Tensor, weights: tuple[Tensor | None, ...], group: int = 0) -> Iterable[Step]:
    if not out.is_contiguous():
        raise Unsupported("a result of a Linear that is not contiguous")
    if not x.is_contiguous():
        packed = torch.zeros(x.shape, dtype=x.dtype)
        yield elementwise("copy", packed, [x])
        x = packed
    sizes = (x.numel() // x.shape[-1], out.shape[-1], x.shape[-1])
    others = [None if each is None else each.contiguous() for each in weights[1:]]
    yield Step(name, View(out, ()), [View(x, ())], sizes, weights=(weights[0], *others), group=group)


def _attention(arguments: Any, keywords: Any, out: Any) -> Iterable[Step]:
    query, key, value = arguments[:3]
    dropout, causal = (*arguments[3:], 0.0, False)[:2]
    mask, scale = keywords.get("attn_mask"), keywords.get("scale")
    batch, heads, queries, width = query.shape
    keys, shared = key.shape[2], key.shape[1]
    if dropout or (causal and keys > 1) or heads % shared or value.shape[-1] != width:
        raise Unsupported("attention that is causal, or has other sizes")
    if not query.dtype == key.dtype == value.dtype or key.dtype not in cpu_gather.DTYPES:
        raise Unsupported(f"attention of {key.dtype}")
    if any(each.stride(-1) != 1 for each in (query, key, value, out[0])):
        raise Unsupported("heads that are not contiguous")
    given = None if mask is None else View(mask.expand(batch, heads, queries, keys))
    views = [View(query), View(key), View(value), given]
    factor = width**-0.5 if scale is None else scale
    yield Step("attention", View(out[0]), views, (batch, heads, queries, keys, width), factor, (heads // shared, 0))


_TRANSLATIONS: dict[Any, Translation] = {
    aten.pow.Tensor_Scalar: _power,
    aten.gelu.default: _gelu,
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _copy,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill_.Scalar: _masked_fill,
    aten.clamp.default: _clamp,
    aten.cat.default: _concatenate,
    aten.mean.dim: _over_last("mean"),
    aten.sum.dim_IntList: _over_last("sum"),
    aten.amax.default: _over_last("amax"),
    SOFTMAX: _softmax,
    aten.native_layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.bmm.default: _matrices,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.linear.default: _dense_linear,
    dense_linear.dense_linear: _dense_linear,
    sparse_linear: _sparse_linear,
    quantized_linear: _quantized_linear,
    CPU_ATTENTION: _attention,
}

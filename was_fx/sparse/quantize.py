"""`quantize`: hold the weights of a model's Linears as rows of int8 or int4, in place.

    was_fx.quantize(model, "int8")
    was_fx.quantize(model, {"*.mlp.*": "int4", "lm_head": "int8"})

Rows of one input channel lie together, so a sparse model skips them as it skips rows of bf16. Thresholds that were
measured on the quantised model fit it best: quantise first, then calibrate.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.quantized.error_feedback import quantize_with_hessian
from was_fx.kernels.quantized.fit import check_finite, quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import GROUPS, INT4, INT8, QuantizedRows, check_group
from was_fx.modules.foreign_weights import drop_quantizer_marks, foreign_linears, make_plain, read_foreign
from was_fx.modules.linears import LinearModule, find_linears, quantised_by
from was_fx.modules.placement import loaded
from was_fx.modules.quantized_linear import format_name, group_of, make_quantized, quantized_linears
from was_fx.modules.weights import is_offloaded, is_sharded
from was_fx.schedules.progress import Progress, report
from was_fx.sparse import saving
from was_fx.sparse.input_moments import input_moments
from was_fx.sparse.state import sparse_state

Weights = str | Mapping[str, str]

ALL_OTHERS = "*"
NONE = "none"
_KNOWN = {INT8: INT8, INT4: f"{INT4}-{GROUPS[0]}", **{f"{INT4}-{g}": f"{INT4}-{g}" for g in GROUPS}, NONE: NONE}

_MEASURED = 2048  # rows of W whose errors are measured at a time


@dataclass(frozen=True)
class Quantized:
    """What became of one weight.

    Attributes:
        name: qualified name of its module.
        format: "int8", or "int4-32" with another group.
        count: N·K.
        before, after: bytes.
        size, off: ‖W‖² and ‖Ŵ − W‖², where Ŵ is the weight that is multiplied with from now on.
        outputs_size, outputs_off: the same of the outputs x Wᵀ, summed over the tokens that it was fitted to; 0 if it
            was fitted to none.
    """

    name: str
    format: str
    count: int
    before: int
    after: int
    size: float
    off: float
    outputs_size: float = 0.0
    outputs_off: float = 0.0


def quantize(
    model: nn.Module,
    weights: Weights = INT8,
    *,
    tokens: Tensor | None = None,
    progress: Progress | None = None,
    told: Callable[[Quantized], None] | None = None,
) -> nn.Module:
    """Quantise the weights of a model's Linears, in place and one by one.

    int8 has one scale for each output and is rounded to nearest. int4 has groups of 32 outputs inside one input channel
    ("int4-64" and "int4-128" have larger ones); the scale and the zero point of a group are searched for the least
    squared error. No data is needed; with `tokens`, channels of int4 are quantised one after the other for the inputs
    that a text gives, each making up for the errors of those before (GPTQ), which is much closer and takes longer.

    Args:
        model: a dense causal LM of transformers. Weights that another library quantised are read back first.
        weights: "int8" or "int4" for all Linears but the head, which becomes int8; or a mapping from patterns of
            qualified names (as of `fnmatch`) to a format or "none". The first that fits counts, and "*", wherever it
            stands, only for what no other fits: {"*": "int4"} is "int4".
        tokens: LongTensor [n, seq] of a text like those that the model will see, 16,000 tokens or more; or None.
        progress: called with (Linears done, all).
        told: called with what became of each weight; measuring it takes a little longer.

    Returns:
        The same model. It can't be undone: load the model again.

    Raises:
        ValueError: a format is not known, a pattern fits no Linear, a Linear has another format already, a group
            doesn't divide the outputs of a Linear, a weight holds NaN or inf, or the model is sparsified, offloaded or
            sharded. The model is untouched.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; call was_fx.densify(model) first, then quantise, then sparsify")
    adopt_foreign(model)
    linears = find_linears(model)
    plan = planned(linears, weights)
    for name in plan:
        _check(name, linears[name], plan[name])
    for done, (name, moments) in enumerate(_with_moments(model, linears, plan, tokens), start=1):
        linear = linears[name]
        with loaded(linear) as weight:
            rows, dtype = _fitted(name, weight, plan[name], moments), weight.dtype
            if told is not None:
                told(_measured(name, weight, rows, moments))
        _replace(model, linear, rows, dtype)
        report(progress, done, len(plan))
    if plan:
        saving.attach(model)
        model._was_quantised_here = True  # type: ignore[assignment]  # it is not what its checkpoint holds
    return model


def planned(linears: Mapping[str, LinearModule], weights: Weights) -> dict[str, str]:
    """The format of each Linear that is to be quantised and is not yet: "int8", or "int4-32" with another group.

    Raises:
        ValueError: a format is not known, a pattern fits no Linear, or a Linear has another format already.
    """
    patterns = {ALL_OTHERS: weights} if isinstance(weights, str) else dict(weights)
    patterns = {pattern: parse_format(format) for pattern, format in patterns.items()}
    rest = patterns.pop(ALL_OTHERS, NONE)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"weights names {pattern!r}, which fits no Linear; there is {', '.join(list(linears)[:4])}, …"
            )
    found = {}
    for name, linear in linears.items():
        others = INT8 if linear.head and rest != NONE else rest
        format = next((format for pattern, format in patterns.items() if fnmatchcase(name, pattern)), others)
        if format == NONE:
            continue
        if linear.rows is None:
            found[name] = format
        elif format_name(linear.rows) != format:
            raise ValueError(
                f"{name} is {format_name(linear.rows)} already, and can't become {format}: load a checkpoint that is "
                "not quantised"
            )
    return found


def parse_format(format: str) -> str:
    """The format with its group.

    Raises:
        ValueError: lists the formats.
    """
    if format not in _KNOWN:
        raise ValueError(f"the format of weights is {format!r}; expected one of {', '.join(_KNOWN)}")
    return _KNOWN[format]


def _check(name: str, linear: LinearModule, format: str) -> None:
    if is_sharded(linear.parameter) or is_offloaded(linear.parameter):
        raise ValueError(f"{name} is offloaded or sharded; load the model on one device or several, then quantise it")
    if format != INT8:
        check_group(name, linear.shape[0], group_of(format))
    check_finite(name, linear.parameter)


def _with_moments(
    model: nn.Module, linears: Mapping[str, LinearModule], plan: Mapping[str, str], tokens: Tensor | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each Linear of the plan, with the moments of its inputs where it is to be int4 and there are tokens."""
    wanted = {name: linears[name] for name, format in plan.items() if format != INT8 and tokens is not None}
    yield from ((name, None) for name in plan if name not in wanted)
    if wanted and tokens is not None:
        for found in input_moments(model, wanted, tokens):
            while found:
                yield found.popitem()
    yield from ((name, None) for name in wanted if linears[name].rows is None)  # that no token reached


def _fitted(name: str, weight: Tensor, format: str, moments: Tensor | None) -> QuantizedRows:
    if format == INT8:
        return quantize_int8(name, weight)
    group = group_of(format)
    if moments is not None:
        return quantize_with_hessian(name, weight, moments, INT4, group)
    return quantize_int4(name, weight, group)


@torch.no_grad()
def _measured(name: str, weight: Tensor, rows: QuantizedRows, moments: Tensor | None) -> Quantized:
    """What became of W [N, K], a few rows of W and Ŵ at a time in fp32."""
    size = off = outputs_size = outputs_off = 0.0
    held = rows.dequantize(weight.dtype).t()
    for first in range(0, len(weight), _MEASURED):
        w, found = weight[first : first + _MEASURED].float(), held[first : first + _MEASURED].float()
        size, off = size + float(w.square().sum()), off + float((found - w).square().sum())
        if moments is not None:
            outputs_size += float(((w @ moments) * w).sum())
            outputs_off += float((((found - w) @ moments) * (found - w)).sum())
    before = weight.numel() * weight.element_size()
    return Quantized(name, format_name(rows), weight.numel(), before, rows.nbytes, size, off, outputs_size, outputs_off)


def _replace(model: nn.Module, linear: LinearModule, rows: QuantizedRows, dtype: torch.dtype) -> None:
    make_quantized(linear.module, rows, dtype)
    if linear.head:
        untie(model)


def untie(model: Any) -> None:
    """Let a quantised head and the input embeddings, which stay as they are, be two."""
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        keys = getattr(model, name, None)
        if isinstance(keys, dict):
            heads = [f"{each}.weight" for each in quantized_linears(model)]
            setattr(model, name, {key: tied for key, tied in keys.items() if key not in heads})


def adopt_foreign(model: nn.Module) -> None:
    """Read back the weights that another library quantised: as rows of int8 where that loses nothing, else dequantised.

    Raises:
        ValueError: a format can't be read; names it and what to do. The model is untouched.
    """
    names = list(foreign_linears(model))
    if not names:
        return
    dtype = getattr(model, "dtype", torch.bfloat16)
    dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
    for name in names:
        try:
            read = read_foreign(name, model.get_submodule(name), dtype)
        except ValueError as error:
            raise ValueError(f"{error} (quantised by {quantised_by(model) or 'a library'})") from error
        if isinstance(read, QuantizedRows):
            channels, outputs = read.shape[::-1]
            plain = make_plain(model, name, torch.empty(0, 0, dtype=dtype, device=read.codes.device))
            plain.in_features, plain.out_features = channels, outputs
            make_quantized(plain, read, dtype)
        elif read is not None:
            make_plain(model, name, read)
    drop_quantizer_marks(model)
    if quantized_linears(model):
        saving.attach(model)

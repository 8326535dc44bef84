"""`quantize`: hold the weights of a model's Linears as rows of int8 or int4, in place.

    was_fx.quantize(model, "int8")
    was_fx.quantize(model, {"*.mlp.*": "int4", "lm_head": "int8"})

Input embeddings are quantised along: those that share the head's weight go on sharing it. Rows of one input channel lie
together, so a sparse model skips them as it skips rows of bf16. Thresholds that were measured on the quantised model
fit it best: quantise first, then calibrate.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.quantized.error_feedback import quantize_with_hessian
from was_fx.kernels.quantized.fit import check_finite, quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import INT4, INT8, QuantizedRows, check_group
from was_fx.modules.foreign_weights import drop_quantizer_marks, foreign_linears, make_plain, read_foreign
from was_fx.modules.linears import LinearModule, find_linears, quantised_by
from was_fx.modules.placement import loaded
from was_fx.modules.quantized_embedding import TIED, make_quantized_embedding
from was_fx.modules.quantized_experts import make_quantized_expert
from was_fx.modules.quantized_linear import format_name, group_of, make_quantized, quantized_linears
from was_fx.modules.weights import is_offloaded, is_sharded
from was_fx.schedules.progress import Progress, report
from was_fx.sparse import saving
from was_fx.sparse.input_moments import input_moments
from was_fx.sparse.state import sparse_state
from was_fx.sparse.weight_plan import Weights, planned

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
        weights: "int8" or "int4" for input embeddings and all Linears but the head, which becomes int8; or a mapping
            from patterns of qualified names (as of `fnmatch`) to a format or "none". The first that fits counts, and
            "*", wherever it stands, only for what no other fits: {"*": "int4"} is "int4". Embeddings that are tied to
            the head have its format, or "none".
        tokens: LongTensor [n, seq] of a text like those that the model will see, 16,000 tokens or more; or None.
        progress: called with (weights done, all).
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
    everything = planned(model, linears, weights)
    plan = {name: format for name, format in everything.items() if name in linears}
    for name in plan:
        _check(name, linears[name], plan[name])
    own = {name: format for name, format in everything.items() if name not in linears and format != TIED}
    for name, format in own.items():  # first, for the text's inputs depend on them
        _quantize_embedding(name, model.get_submodule(name), format, told)
        report(progress, 1, len(plan) + 1)
    for done, (name, moments) in enumerate(_with_moments(model, linears, plan, tokens), start=1 + len(own)):
        linear = linears[name]
        with loaded(linear) as weight:
            rows, dtype = _fitted(name, weight, plan[name], moments), weight.dtype
            if told is not None:
                told(_measured(name, weight, rows, moments))
        if linear.expert is not None:
            make_quantized_expert(linear.module, linear.held, linear.expert, rows, dtype)
        else:
            make_quantized(linear.module, rows, dtype)
        if linear.head:
            for each in (name for name, format in everything.items() if format == TIED):
                make_quantized_embedding(model.get_submodule(each), None, linear.module)
            untie(model)
        report(progress, done, len(plan) + len(own))
    if everything:
        saving.attach(model)
        refuse_resizing(model)
        model.was_quantised_here = True  # type: ignore[assignment]  # it is not what its checkpoint holds
    return model


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
        return quantize_int8(weight)
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


def _quantize_embedding(name: str, module: Any, format: str, told: Callable[[Quantized], None] | None) -> None:
    weight = module.weight
    check_finite(name, weight)
    if format != INT8:
        check_group(name, len(weight), group_of(format))
    rows = _fitted(name, weight, format, None)
    if told is not None:
        told(_measured(name, weight, rows, None))
    make_quantized_embedding(module, rows)


def refuse_resizing(model: Any) -> None:
    """Let a model with quantised weights refuse another vocabulary, for which transformers would make plain ones."""
    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = partial(_resize, model)


def _resize(model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any) -> Any:
    found = model.get_input_embeddings()
    if pad_to_multiple_of is None and new_num_tokens in (None, found.num_embeddings):
        return found
    raise ValueError(
        f"the weights of the model are quantised, so its {found.num_embeddings} tokens can't be made "
        f"{new_num_tokens or 'more'}: resize the unquantised model, then quantise it"
    )


def untie(model: Any) -> None:
    """Let transformers not tie a quantised head and the input embeddings, which are tied by `QuantizedEmbedding`."""
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
        refuse_resizing(model)

"""The op that a Linear with quantised weights is: `torch.ops.was.quantized_linear`, and the same for siblings.

    quantized_linear    y = (x ⊙ [not |x| ≤ t]) Wᵀ + b        x [..., K], W [N, K] as `QuantizedRows`, b [N], t [K] fp32
    quantized_siblings  y = concat(y_1, …, y_G)                of one format, sharing x

Without t every channel is kept. `tokens` is as for `sparse_linear`. Few tokens read the rows of codes that they keep;
for many, Wᵀ is written out in x's dtype, one Linear at a time, and multiplied densely.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import cpu_quantized, dense_linear
from was_fx.kernels.linear.arguments import check_arguments
from was_fx.kernels.linear.sparse_linear import dropped_channels
from was_fx.kernels.parts.private_names import calls_plainly
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import Choice, note_served
from was_fx.kernels.quantized.rows import QuantizedRows


def reference(
    x: Tensor,
    rows: Sequence[QuantizedRows],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor | None],
    tokens: Tensor | None = None,
) -> Tensor:
    """The op's meaning in plain PyTorch; any device and floating dtype.

    Args:
        x: [..., K].
        rows: G weights [N_i, K].
        biases: G entries, [N_i] or None.
        thresholds: G entries, [K] fp32, or None where every channel is kept.
        tokens: see `dropped_channels`.

    Returns:
        [..., ΣN_i], x's dtype.
    """

    def product(kept: Tensor, weight: QuantizedRows, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(kept, weight.dequantize(x.dtype).t(), bias)

    return _by_products(product, x, rows, biases, thresholds, tokens)


def _by_products(
    product: Callable[[Tensor, QuantizedRows, Tensor | None], Tensor],
    x: Tensor,
    rows: Sequence[QuantizedRows],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor | None],
    tokens: Tensor | None,
) -> Tensor:
    """`product(x̃, W, b)` of each weight, side by side; x̃ is x without its dropped channels."""
    outputs = []
    for weight, bias, threshold in zip(rows, biases, thresholds, strict=True):
        kept = x if threshold is None else x.masked_fill(dropped_channels(x, threshold, tokens), 0)
        outputs.append(product(kept, weight, bias))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def choose(x: Tensor, rows: Sequence[QuantizedRows], tokens: Tensor | None = None) -> Choice:
    """What serves x [..., K]; nothing is read but shapes, dtypes, strides and devices."""
    if tokens is not None:
        return Choice("dequantised_product", "some tokens keep every channel", None)
    if x.is_cuda:
        from was_fx.kernels.linear import gpu_quantized  # imports triton

        if gpu_quantized.supports(x, rows):
            return Choice("gpu_quantized", "few tokens on a GPU, rows of codes", gpu_quantized.sparse_linear)
    elif cpu_quantized.supports(x, rows):
        return cpu_quantized.choice()
    why = f"{x.numel() // max(x.shape[-1], 1)} tokens of {x.dtype} on {x.device.type}"
    return Choice("dequantised_product", why, None)


def compute(
    x: Tensor,
    rows: Sequence[QuantizedRows],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor | None],
    tokens: Tensor | None = None,
) -> Tensor:
    """See `reference`; by what `choose` chooses."""
    for weight, bias, threshold in zip(rows, biases, thresholds, strict=True):
        _check(x, weight, bias, threshold, tokens)
    if tokens is not None and tokens.device.type == "cpu" and bool(tokens.all()):
        tokens = None
    choice = choose(x, rows, tokens)
    if any(threshold is not None for threshold in thresholds):
        note_served([weight.codes for weight in rows], choice.name, choice.reason)
    if choice.function is not None:
        return choice.function(x, rows, biases, thresholds)
    return _by_products(_dense_product, x, rows, biases, thresholds, tokens)


def _dense_product(x: Tensor, weight: QuantizedRows, bias: Tensor | None) -> Tensor:
    return dense_linear.compute(x, _write_out(weight, x.dtype).t(), bias)


def _write_out(weight: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """Wᵀ [K, N], in one pass."""
    if weight.codes.is_cuda:
        from was_fx.kernels.linear import gpu_write_out  # imports triton

        if gpu_write_out.supports(weight, dtype):
            return gpu_write_out.write_out(weight, dtype)
    return cpu_quantized.write_out(weight, dtype)


def _check(
    x: Tensor, weight: QuantizedRows, bias: Tensor | None, threshold: Tensor | None, tokens: Tensor | None
) -> None:
    held = (weight.codes, weight.scales) if weight.groups is None else (weight.codes, weight.scales, weight.groups)
    check_arguments("quantized_linear", x, weight.shape, held, bias, threshold, tokens)


def _one(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    tokens: Tensor | None,
) -> Tensor:
    return compute(x, (QuantizedRows(codes, scales, groups),), (bias,), (threshold,), tokens)


def _one_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    tokens: Tensor | None,
) -> Tensor:
    weight = QuantizedRows(codes, scales, groups)
    _check(x, weight, bias, threshold, tokens)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _siblings(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None,
) -> Tensor:
    return compute(x, _rows(codes, scales, groups), biases, thresholds, tokens)


def _siblings_fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in _rows(codes, scales, groups)))


def _rows(codes: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[Tensor]) -> list[QuantizedRows]:
    every: Sequence[Tensor | None] = groups or [None] * len(codes)
    return [QuantizedRows(*each) for each in zip(codes, scales, every, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, groups, _, threshold, tokens = inputs
    ctx.save_for_backward(x, codes, scales, groups, threshold, tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of y = x̃ Wᵀ + b, x̃ = x without its dropped channels, as if the choice of channels were a constant."""
    x, codes, scales, groups, threshold, tokens = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ QuantizedRows(codes, scales, groups).dequantize(grad.dtype).t()
        if threshold is not None:
            grad_x = grad_x.masked_fill(dropped_channels(x, threshold, tokens), 0)
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, bias, None, None


quantized_linear = register_op(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? groups, Tensor? bias, Tensor? threshold, "
    "Tensor? tokens) -> Tensor",
    _one,
    _one_fake,
)
torch.library.register_autograd(quantized_linear, _backward, setup_context=_save_for_backward)
quantized_siblings = register_op(
    "quantized_siblings(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] groups, Tensor?[] biases, "
    "Tensor[] thresholds, Tensor? tokens) -> Tensor",
    _siblings,
    _siblings_fake,
)


def call(
    x: Tensor, rows: QuantizedRows, bias: Tensor | None, threshold: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """`was::quantized_linear`; on a CPU past the dispatcher where nothing needs it."""
    if not torch.compiler.is_compiling() and x.is_cpu and calls_plainly(x):
        return compute(x, (rows,), (bias,), (threshold,), tokens)
    return quantized_linear(x, rows.codes, rows.scales, rows.groups, bias, threshold, tokens)

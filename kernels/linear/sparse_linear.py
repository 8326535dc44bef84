"""The op that a sparse Linear is: `torch.ops.was.sparse_linear`, and the same for siblings that share an input.

    sparse_linear    y = (x ⊙ [not |x| ≤ t]) Wᵀ + b           x [..., K], W [N, K], b [N], t [K] fp32 -> y [..., N]
    sparse_siblings  y = concat(y_1, …, y_G)                   W_i [N_i, K] -> y [..., ΣN_i]

`tokens`, bool with one element for each row of x, says which tokens drop channels; the others keep all. Without it
every token drops. A channel whose magnitude is NaN is kept, so NaN travels as it does in a dense Linear.

`reference` is the meaning and runs anywhere. `choose` is the one place that picks an implementation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather, dense_linear
from was_fx.kernels.linear.arguments import check_arguments
from was_fx.kernels.parts.private_names import calls_plainly, is_transforming
from was_fx.kernels.parts.served import Choice, note_served


def dropped_channels(x: Tensor, threshold: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Which channels of which tokens are dropped.

    Args:
        x: [..., K], any floating dtype.
        threshold: [K] fp32, compared with |x| in fp32.
        tokens: bool, one element for each row of x: whether the token drops channels at all; None for all.

    Returns:
        bool like x.
    """
    dropped = x.abs() <= threshold
    return dropped if tokens is None else dropped & tokens.reshape(*x.shape[:-1], 1)


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None = None,
) -> Tensor:
    """The op's meaning in plain PyTorch; any device, floating dtype and strides.

    Args:
        x: [..., K].
        weights: G tensors [N_i, K] of x's dtype.
        biases: G entries, [N_i] or None.
        thresholds: G tensors [K] fp32.
        tokens: see `dropped_channels`.

    Returns:
        [..., ΣN_i], x's dtype.
    """
    outputs = [
        torch.nn.functional.linear(x.masked_fill(dropped_channels(x, threshold, tokens), 0), weight, bias)
        for weight, bias, threshold in zip(weights, biases, thresholds, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def choose(x: Tensor, weights: Sequence[Tensor], tokens: Tensor | None = None) -> Choice:
    """What serves x [..., K] and weights [N_i, K]: the first whose `supports` says yes, else a dense product of x
    without its dropped channels.

    Nothing is read but shapes, dtypes, strides and devices.
    """
    if tokens is not None:
        return _product(x, weights, "some tokens keep every channel")
    if x.is_cuda:
        from was_fx.kernels.linear import gather_gemv, gpu_linear, masked_gemm  # imports triton

        if gather_gemv.supports(x, weights):
            return Choice("gpu_gather", "one token on a GPU, rows of Wᵀ contiguous", gpu_linear.gathered)
        if masked_gemm.supports(x, weights):
            return Choice("gpu_masked", "a few tokens on a GPU, rows of Wᵀ contiguous", gpu_linear.masked)
        return _product(x, weights)
    if cpu_gather.supports(x, weights):
        return cpu_gather.choice()
    if cpu_embedding_bag.supports(x, weights):
        return Choice("cpu_embedding_bag", "no C++ compiler was found", cpu_embedding_bag.sparse_linear)
    return _product(x, weights)


def _product(x: Tensor, weights: Sequence[Tensor], why: str = "") -> Choice:
    if not why and not all(weight.t().is_contiguous() for weight in weights):
        why = "rows of Wᵀ are not contiguous"
    why = why or f"{x.numel() // max(x.shape[-1], 1)} tokens of {x.dtype} on {x.device.type}"
    return Choice("dense_product", why, None)


def compute(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None = None,
) -> Tensor:
    """See `reference`; by what `choose` chooses."""
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        _check(x, weight, bias, threshold, tokens)
    if tokens is not None and tokens.device.type == "cpu" and bool(tokens.all()):
        tokens = None
    choice = choose(x, weights, tokens)
    note_served(weights, choice.name, choice.reason)
    if choice.function is None:
        return masked(x, weights, biases, thresholds, tokens)
    return choice.function(x, weights, biases, thresholds)


def masked(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None = None,
) -> Tensor:
    """`reference`, with the products that `dense_linear` chooses."""
    outputs = [
        dense_linear.compute(x.masked_fill(dropped_channels(x, threshold, tokens), 0), weight, bias)
        for weight, bias, threshold in zip(weights, biases, thresholds, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, tokens: Tensor | None) -> None:
    check_arguments("sparse_linear", x, weight.shape, (weight,), bias, threshold, tokens, weight.dtype)


def _one(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, tokens: Tensor | None) -> Tensor:
    return compute(x, (weight,), (bias,), (threshold,), tokens)


def _one_fake(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, tokens: Tensor | None) -> Tensor:
    _check(x, weight, bias, threshold, tokens)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _siblings_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    tokens: Tensor | None,
) -> Tensor:
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        _check(x, weight, bias, threshold, tokens)
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, threshold, tokens = inputs
    ctx.save_for_backward(x, weight, threshold, tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of y = x̃ Wᵀ + b, x̃ = x without its dropped channels, as if the choice of channels were a constant."""
    x, weight, threshold, tokens = ctx.saved_tensors
    dropped = dropped_channels(x, threshold, tokens)
    grad_x = (grad @ weight).masked_fill(dropped, 0) if ctx.needs_input_grad[0] else None
    rows = grad.reshape(-1, grad.shape[-1])
    kept = x.masked_fill(dropped, 0).reshape(-1, x.shape[-1])
    grad_weight = rows.t() @ kept if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None, None


_library = torch.library.Library("was", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, Tensor? tokens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("sparse_linear", _one, "CompositeExplicitAutograd")
torch.library.register_fake("was::sparse_linear", _one_fake, lib=_library)
torch.library.register_autograd("was::sparse_linear", _backward, setup_context=_save_for_backward, lib=_library)
_library.define(
    "sparse_siblings(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] thresholds, Tensor? tokens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("sparse_siblings", compute, "CompositeExplicitAutograd")
torch.library.register_fake("was::sparse_siblings", _siblings_fake, lib=_library)


def call(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, tokens: Tensor | None) -> Tensor:
    """`was::sparse_linear`; on a CPU past the dispatcher, which takes as long as a small product, where nothing needs
    it. By its meaning under a transform of torch.func, which can't see into an op with a backward of its own."""
    if not torch.compiler.is_compiling():
        if x.is_cpu and calls_plainly(x, weight):
            return compute(x, (weight,), (bias,), (threshold,), tokens)
        if is_transforming():
            return reference(x, (weight,), (bias,), (threshold,), tokens)
    return sparse_linear(x, weight, bias, threshold, tokens)


sparse_linear = torch.ops.was.sparse_linear.default
sparse_siblings = torch.ops.was.sparse_siblings.default

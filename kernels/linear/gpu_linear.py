"""Sparse Linears of one token or a few on a GPU, all steps in one call, for graphs that were not split further."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import gather_gemv
from was_fx.kernels.linear.masked_gemm import masked_gemm, masked_gemm_config
from was_fx.kernels.ops.compact import compact
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS


def gathered(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for one token, whose kept channels are listed and their rows of Wᵀ read (`gather_gemv`).

    See `sparse_linear.reference` for the meaning.
    """
    return in_groups(_gathered, x, weights, biases, thresholds)


def masked(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for a few tokens, which all rows of Wᵀ are read for (`masked_gemm`).

    See `sparse_linear.reference` for the meaning.
    """
    return in_groups(_masked, x, weights, biases, thresholds)


def _gathered(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], sizes: list[int]) -> Tensor:
    splits = gemv_config(x.device, x.dtype, x.shape[-1], sizes).splits
    return gather_gemv(x, *compact(x, thresholds), weights, splits)


def _masked(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], sizes: list[int]) -> Tensor:
    return masked_gemm(x, weights, thresholds, masked_gemm_config(x.device, x.shape[-1], sizes).splits)


def in_groups(
    product: Callable[[Tensor, Sequence[Any], Sequence[Any], list[int]], Tensor],
    x: Tensor,
    weights: Sequence[Any],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Any],
) -> Tensor:
    """The outputs of Linears, one after the other, by a product of as many as a launch takes.

    Args:
        product: of x, weights, thresholds and the weights' numbers of outputs N_g; gives its parts [S, ..., ΣN_g] fp32.
        x: [..., K].
        weights: of shape [N, K] each.
        biases: [N] each, or None.
        thresholds: one for each weight.

    Returns:
        [..., ΣN] of x's dtype.
    """
    outputs = []
    for first in range(0, len(weights), MAX_SIBLINGS):
        chosen = slice(first, first + MAX_SIBLINGS)
        sizes = [weight.shape[0] for weight in weights[chosen]]
        partial = product(x, weights[chosen], thresholds[chosen], sizes)
        total = partial[0] if len(partial) == 1 else partial.sum(0)
        for part, bias in zip(total.split(sizes, dim=-1), biases[chosen], strict=True):
            outputs.append((part if bias is None else part + bias.float()).to(x.dtype))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y.reshape(*x.shape[:-1], -1)

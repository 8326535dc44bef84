"""Sparse Linears of one token or a few on a GPU, all steps in one call, for graphs that were not split further."""

from collections.abc import Callable, Sequence

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
    return _in_groups(_gathered, x, weights, biases, thresholds)


def masked(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for a few tokens, which all rows of Wᵀ are read for (`masked_gemm`).

    See `sparse_linear.reference` for the meaning.
    """
    return _in_groups(_masked, x, weights, biases, thresholds)


def _gathered(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], sizes: list[int]) -> Tensor:
    splits = gemv_config(x.device, x.dtype, x.shape[-1], sizes).splits
    return gather_gemv(x, *compact(x, thresholds), weights, splits)


def _masked(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], sizes: list[int]) -> Tensor:
    return masked_gemm(x, weights, thresholds, masked_gemm_config(x.shape[-1], sizes).splits)


def _in_groups(
    product: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], list[int]], Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
) -> Tensor:
    """The outputs of Linears, one after the other, by a product of as many as a launch takes, which gives its parts."""
    outputs = []
    for first in range(0, len(weights), MAX_SIBLINGS):
        chosen = slice(first, first + MAX_SIBLINGS)
        sizes = [weight.shape[0] for weight in weights[chosen]]
        total = product(x, weights[chosen], thresholds[chosen], sizes).sum(0)
        for part, bias in zip(total.split(sizes, dim=-1), biases[chosen], strict=True):
            outputs.append((part if bias is None else part + bias.float()).to(x.dtype))
    return torch.cat(outputs, dim=-1).reshape(*x.shape[:-1], -1)

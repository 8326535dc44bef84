"""Sparse Linear of a few tokens on a GPU, all steps in one call, for graphs that were not split further."""

from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear.masked_gemm import masked_gemm, masked_gemm_config, supports
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS

__all__ = ["sparse_linear", "supports"]


def sparse_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for a few tokens; see `sparse_linear.reference` for the meaning."""
    outputs = []
    for first in range(0, len(weights), MAX_SIBLINGS):
        chosen = slice(first, first + MAX_SIBLINGS)
        sizes = [weight.shape[0] for weight in weights[chosen]]
        splits = masked_gemm_config(x.shape[-1], sizes).splits
        total = masked_gemm(x, weights[chosen], thresholds[chosen], splits).sum(0)
        for part, bias in zip(total.split(sizes, dim=-1), biases[chosen], strict=True):
            outputs.append((part if bias is None else part + bias.float()).to(x.dtype))
    return torch.cat(outputs, dim=-1)

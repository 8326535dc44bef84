"""Sparse Linear of one token on a GPU, all steps in one call, for graphs that were not split further.

The channels that the token keeps are listed (`compact`), their rows of Wᵀ are read (`gather_gemv`), and the parts are
added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import gather_gemv, supports
from was_fx.kernels.ops.compact import compact
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS

__all__ = ["sparse_linear", "supports"]


def sparse_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for one token; see `sparse_linear.reference` for the meaning."""
    outputs = []
    for first in range(0, len(weights), MAX_SIBLINGS):
        chosen = slice(first, first + MAX_SIBLINGS)
        sizes = [weight.shape[0] for weight in weights[chosen]]
        splits = gemv_config(x.device, x.dtype, x.shape[-1], sizes).splits
        index, count = compact(x, thresholds[chosen])
        total = gather_gemv(x, index, count, weights[chosen], splits).sum(0)
        for part, bias in zip(total.split(sizes, dim=-1), biases[chosen], strict=True):
            outputs.append((part if bias is None else part + bias.float()).to(x.dtype))
    return torch.cat(outputs, dim=-1).reshape(*x.shape[:-1], -1)

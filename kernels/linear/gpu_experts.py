"""A product with chosen experts on a GPU, all steps in one call: for eager mode, and for graphs that were not split.

The channels that each pair of a token and an expert keeps are listed (`compact_experts`), their rows are read by one
launch (`gather_experts`), and the parts are added.
"""

import torch
from torch import Tensor

from was_fx.kernels.linear.gather_experts import gather_experts, supports
from was_fx.kernels.ops.compact_experts import compact_experts
from was_fx.kernels.parts.gemv_config import experts_config

__all__ = ["sparse_experts", "supports"]


def sparse_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, experts: Tensor, tokens: None
) -> Tensor:
    """`was::sparse_experts` for few tokens, all of them sparse; see `sparse_experts.reference` for the meaning."""
    _, outputs, channels = weight.shape
    splits = experts_config(x.device, x.dtype, channels, outputs, experts.shape[0]).splits
    listed = compact_experts(x, threshold, experts)
    return finish(gather_experts(x, *listed, weight, experts, splits).sum(0), bias, experts, x.dtype)


def finish(total: Tensor, bias: Tensor | None, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """y [S, N] of its sums in fp32. An expert of another rank has no channels, and its biases are left out too."""
    if bias is not None:
        known = (experts >= 0) & (experts < bias.shape[0])
        total = total + bias[experts.clamp(0, bias.shape[0] - 1)] * known[:, None]
    return total.to(dtype)

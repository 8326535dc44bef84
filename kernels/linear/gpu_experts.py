"""A product with chosen experts on a GPU, all steps in one call: for eager mode, and for graphs that were not split.

The channels that each pair of a token and an expert keeps are listed (`compact_experts`), their rows are read by one
launch (`gather_experts`), and the parts are added.
"""

import torch
from torch import Tensor

from was_fx.kernels.linear import gather_quantized_gemv
from was_fx.kernels.linear.gather_experts import (
    MAX_PAIRS,
    gather_experts,
    gather_quantized_experts,
    quantized_config,
    supports,
)
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


def supports_quantized(x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor | None, experts: Tensor) -> bool:
    """Whether `quantized_experts` serves x [R, K] and such weights of E experts."""
    if experts.shape[0] > MAX_PAIRS or not codes.is_contiguous():
        return False
    return gather_quantized_gemv.supports(x[:1], [codes[0]], [scales[0]], [] if groups is None else [groups[0]])


def quantized_experts(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    experts: Tensor,
) -> Tensor:
    """`was::quantized_experts` for few tokens, all of them sparse."""
    listed = compact_experts(x, threshold, experts)
    splits = quantized_config(x, codes, scales, groups, experts).splits
    partial = gather_quantized_experts(x, *listed, codes, scales, groups, experts, splits)
    return finish(partial.sum(0), bias, experts, x.dtype)


def finish(total: Tensor, bias: Tensor | None, experts: Tensor, dtype: torch.dtype) -> Tensor:
    """y [S, N] of its sums in fp32. An expert of another rank has no channels, and its biases are left out too."""
    if bias is not None:
        known = (experts >= 0) & (experts < bias.shape[0])
        total = total + bias[experts.clamp(0, bias.shape[0] - 1)] * known[:, None]
    return total.to(dtype)

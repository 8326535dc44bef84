"""A Linear with quantised weights on a GPU, all steps in one call, as `gpu_linear` does with plain ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear import gather_quantized_gemv
from was_fx.kernels.linear.gpu_linear import in_groups
from was_fx.kernels.ops.compact import compact
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.quantized.rows import QuantizedRows


def supports(x: Tensor, rows: Sequence[QuantizedRows]) -> bool:
    """Whether this serves x [..., K] and these weights: few tokens on a GPU, one format."""
    if len({weight.format for weight in rows}) > 1:
        return False
    return gather_quantized_gemv.supports(x, *_tensors(rows))


def sparse_linear(
    x: Tensor,
    rows: Sequence[QuantizedRows],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor | None],
) -> Tensor:
    """`was::quantized_linear` for few tokens; see `quantized_linear.reference` for the meaning."""
    return in_groups(_product, x, rows, biases, thresholds)


def _product(x: Tensor, rows: Sequence[QuantizedRows], thresholds: Sequence[Tensor | None], sizes: list[int]) -> Tensor:
    splits = gemv_config(x.device, rows[0].format, x.shape[-1], sizes).splits
    index, count, limits = _list(x, thresholds)
    return gather_quantized_gemv.gather_quantized_gemv(x, index, count, *_tensors(rows), limits, splits)


def _list(x: Tensor, thresholds: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor]]:
    """The kept channels and the thresholds; no list where one token, such as the last before a head, keeps them all."""
    if x.numel() == x.shape[-1] and all(threshold is None for threshold in thresholds):
        return None, None, []
    # |x| is never below -1, and NaN is kept.
    limits = [x.new_full(x.shape[-1:], -1.0, dtype=torch.float32) if t is None else t for t in thresholds]
    return *compact(x, limits), limits


def _tensors(rows: Sequence[QuantizedRows]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Codes, scales and groups of weights of one format; no groups for int8."""
    groups = [weight.groups for weight in rows if weight.groups is not None]
    return [weight.codes for weight in rows], [weight.scales for weight in rows], groups

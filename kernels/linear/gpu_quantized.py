"""A Linear with quantised weights on a GPU, all steps in one call, as `gpu_linear` does with plain ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear import gather_quantized_gemv
from was_fx.kernels.ops.compact import compact
from was_fx.kernels.parts.gemv_config import gemv_config
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS
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
    outputs = []
    for first in range(0, len(rows), MAX_SIBLINGS):
        chosen = slice(first, first + MAX_SIBLINGS)
        sizes = [weight.shape[0] for weight in rows[chosen]]
        splits = gemv_config(x.device, rows[first].format, x.shape[-1], sizes).splits
        index, count, limits = _list(x, thresholds[chosen])
        partial = gather_quantized_gemv.gather_quantized_gemv(x, index, count, *_tensors(rows[chosen]), limits, splits)
        total = partial[0] if splits == 1 else partial.sum(0)
        for part, bias in zip(total.split(sizes, dim=-1), biases[chosen], strict=True):
            outputs.append((part if bias is None else part + bias.float()).to(x.dtype))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y.reshape(*x.shape[:-1], -1)


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

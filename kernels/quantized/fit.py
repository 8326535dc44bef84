"""Quantise a weight by itself, without data: int8 by rounding, int4 by a search of each group's scale and zero point.

For a group w of outputs inside one input channel, candidates shrink the range that the sixteen levels span, for the
few extreme weights cost less than what finer steps win for all others; from each, least squares fit the step and the
zero point to the levels that were taken, and levels are taken anew. The candidate with the smallest squared error is
kept. (HQQ's half-quadratic fit, https://mobiusml.github.io/hqq_blog, moves the zero point only.)
"""

import torch
from torch import Tensor

from was_fx.kernels.quantized.rows import QuantizedRows, check_group, pack_int4, pack_int8

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_ROUNDS = 2
_PIECE = 1 << 20  # weights that are fitted at a time, each by all candidates


@torch.no_grad()
def quantize_int8(weight: Tensor) -> QuantizedRows:
    """Round W [N, K], finite, to the nearest of 255 levels, one scale for each output."""
    scales = int8_scales(weight)
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.int8, device=weight.device)
    for columns in _pieces(weight.shape[1], weight.shape[0]):
        codes[columns] = round_int8(weight[:, columns].t().float(), scales)
    return QuantizedRows(pack_int8(codes), scales, None)


def int8_scales(weight: Tensor) -> Tensor:
    """Scales fp32 [N] that bring the largest weight of each output of W [N, K] to level 127."""
    return (weight.abs().amax(1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)


def round_int8(rows: Tensor, scales: Tensor) -> Tensor:
    """The nearest levels, int8 [C, N] of −127 … 127, of rows [C, N] fp32 of Wᵀ."""
    return (rows / scales).round().clamp(-127, 127).to(torch.int8)


@torch.no_grad()
def quantize_int4(name: str, weight: Tensor, group: int = 32) -> QuantizedRows:
    """Fit W [N, K], finite, by groups of outputs inside one input channel.

    Raises:
        ValueError: the group does not divide N.
    """
    outputs, channels = weight.shape
    check_group(name, outputs, group)
    made = empty_int4(outputs, channels, group, weight.device)
    assert made.groups is not None
    for rows in _pieces(channels, outputs):
        codes, scales, groups = fit_int4(weight[:, rows].t().float(), group)
        made.codes[rows], made.scales[rows], made.groups[rows] = pack_int4(codes), scales, groups
    return made


def empty_int4(outputs: int, channels: int, group: int, device: torch.device | str) -> QuantizedRows:
    """Rows to be filled."""
    return QuantizedRows(
        torch.empty(channels, outputs // 2, dtype=torch.uint8, device=device),
        torch.empty(channels, dtype=torch.float32, device=device),
        torch.empty(channels, outputs // group, 2, dtype=torch.uint8, device=device),
    )


def fit_int4(rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and groups of rows [C, N] fp32 of Wᵀ.

    Returns:
        (uint8 [C, N] of 0 … 15, fp32 [C], uint8 [C, N / group, 2]).
    """
    scales, groups = fit_groups(rows, group)
    return round_int4(rows, scales, groups), scales, groups


def fit_groups(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales fp32 [C] and groups uint8 [C, N / group, 2] that fit rows [C, N] fp32 of Wᵀ."""
    w = rows.unflatten(1, (-1, group))
    low, high = w.amin(2).clamp_max(0), w.amax(2).clamp_min(0)
    step, zero = _best(w, low, high)
    scales = (step.amax(1) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    s = (step / scales[:, None]).round().clamp(1, 255)
    z = (zero * 16).round().clamp(0, 255)
    return scales, torch.stack((s, z), 2).to(torch.uint8)


def round_int4(rows: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """The nearest levels, uint8 [C, N] of 0 … 15, of rows [C, N] fp32 to scales [C] and groups [C, N / group, 2]."""
    w = rows.unflatten(1, (groups.shape[1], -1))
    q = _levels(w, scales[:, None] * groups[..., 0], groups[..., 1] / 16)
    return q.flatten(1).to(torch.uint8)


def _best(w: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the zero point [C, groups] with the smallest squared error of all candidates."""
    shrink = torch.tensor(SHRINK, device=w.device)[:, None, None]
    trial = ((high - low) * (shrink / 15)).clamp_min(torch.finfo(torch.float32).tiny)  # [candidates, C, groups]
    at = (-low * shrink / trial).clamp(0, 15.9375)
    step, zero, least = trial, at, torch.full_like(trial, torch.inf)
    for round_ in range(_ROUNDS + 1):
        q = _levels(w, trial, at)
        error = (trial[..., None] * (q - at[..., None]) - w).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        step, zero = torch.where(better, trial, step), torch.where(better, at, zero)
        if round_ < _ROUNDS:
            trial, at = _least_squares(w, q, trial, at)
    best = least.argmin(0, keepdim=True)
    return step.gather(0, best)[0], zero.gather(0, best)[0]


def _least_squares(w: Tensor, q: Tensor, step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point that fit w ≈ step · (q − zero) best; as they were where all levels are one."""
    mean_q, mean_w = q.mean(-1), w.mean(-1)
    centred = q - mean_q[..., None]
    variance = centred.square().sum(-1)
    slope = (centred * w).sum(-1) / variance
    good = (variance > 0) & (slope > 0)
    fitted = torch.where(good, slope, step)
    at = torch.where(good, mean_q - mean_w / fitted, zero).clamp(0, 15.9375)
    return fitted, at


def _levels(w: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return (w / step[..., None] + zero[..., None]).round_().clamp_(0, 15)


def _pieces(rows: int, width: int) -> list[slice]:
    """Slices of `rows` rows of so many numbers, each of a bounded size."""
    size = max(1, _PIECE // max(width, 1))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that holds NaN or inf.

    Raises:
        ValueError: names it.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{name}: the weight holds NaN or inf, which can't be quantised; check the checkpoint")

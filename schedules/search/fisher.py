"""The recipe `fisher`: channels are dropped by what they cost the loss per byte that they save.

Channel j of Linear i is dropped when x_j² g_j² / c_i ≤ λ, with one λ for all Linears; g are Fisher weights and c_i is
what a dropped channel saves. So τ_i = √(λ c_i) in units of |x_j|·g_j, and every Linear's sparsity follows from λ.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import weights_read
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.schedule import LinearSchedule, Schedule, ScheduleMetadata
from was_fx.schedules.search.latency import LatencyTable
from was_fx.schedules.selection import select

# Bytes of a weight, relative to each other; another format counts as 16 bits.
_BYTES = {"int8": 1.0, "int4": 0.5}


def fisher(
    calibration: Calibration,
    target: float,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    latency: LatencyTable | None = None,
) -> Schedule:
    """Schedule calibrated Linears so that the loss, as Fisher weights see it, is lowest at the target.

    Args:
        calibration: made with `calibrate(..., fisher=True)`.
        target: the model sparsity, at least 0 and below 1; it is met exactly.
        include: qualified names of the Linears to schedule, or patterns of them (see `was_fx.schedules.selection`);
            by default all that were calibrated.
        exclude: those to leave dense; they do not count in the model sparsity.
        latency: save what the same sparsity everywhere would save in time, by these measured curves, instead of in
            bytes. The model sparsity is then another one than the target.

    Returns:
        A `Schedule` with thresholds of its own for each channel, t_j = τ / g_j.

    Raises:
        ValueError: for a target out of range.
        ScheduleError: the calibration has no Fisher weights; a name or pattern that matches no calibrated Linear; a
            shape that is not in the latency table.
    """
    scores = fisher_scores_of(calibration)
    shapes = {name: calibration.shapes[name] for name in select(calibration.shapes, include, exclude)}
    read = weights_read(shapes, calibration.experts_per_token)
    if latency is None:
        sparsities = allocate(scores, calibration.levels, read, channel_costs(shapes, calibration.weights), target)
    else:
        sparsities = allocate_time(scores, calibration.levels, shapes, read, latency, target)
    return fisher_schedule(
        scores,
        calibration.levels,
        shapes,
        sparsities,
        calibration.metadata("fisher", target, shapes),
    )


def fisher_scores_of(calibration: Calibration) -> FisherScores:
    """The Fisher scores of a calibration; ScheduleError if it has none."""
    if calibration.fisher is None:
        raise ScheduleError(
            "the calibration has no Fisher weights",
            remedy="Calibrate with fisher=True (was calibrate --fisher): it takes one backward pass.",
        )
    return calibration.fisher


def channel_costs(shapes: Mapping[str, tuple[int, int]], weights: Mapping[str, str] | None) -> dict[str, float]:
    """What a dropped channel of each Linear [N, K] saves: its bytes, up to a common factor.

    Args:
        shapes: (N, K) by qualified name.
        weights: formats of quantised Linears, by qualified name.
    """
    formats = weights or {}
    return {name: n * _BYTES.get(formats.get(name, "").split("-")[0], 2.0) for name, (n, _) in shapes.items()}


def allocate(
    scores: FisherScores,
    levels: Tensor,
    read: Mapping[str, float],
    costs: Mapping[str, float],
    target: float,
    multipliers: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Sparsity of each Linear by one λ, so that the mean weighted by what a token reads is the target.

    Args:
        scores: of at least these Linears.
        levels: sparsities of the scores' thresholds, [L].
        read: weights that a token reads of each Linear to schedule (`weights_read`), by qualified name.
        costs: what a dropped channel of each saves.
        target: model sparsity, at least 0 and at most the last level.
        multipliers: of λ, by qualified name; 1 where there is none.

    Raises:
        ValueError: for a target out of range.
    """
    last = float(levels[-1])
    if not 0 <= target <= last:
        raise ValueError(f"the target sparsity must be from 0 to {last:.6g}, found {target!r}")
    sizes = np.array(list(read.values()), dtype=np.float64)
    at = levels.double().numpy()
    curves = [scores.thresholds[name].double().numpy() for name in read]
    scale = np.sqrt([costs[name] * (multipliers or {}).get(name, 1.0) for name in read])

    def sparsities(root: float) -> np.ndarray:
        return np.array([np.interp(root * each, curve, at) for each, curve in zip(scale, curves, strict=True)])

    def mean(root: float) -> float:
        return float(sizes @ sparsities(root) / sizes.sum())

    root = _solve(mean, target, max(curve[-1] / each for each, curve in zip(scale, curves, strict=True)))
    return dict(zip(read, _settled(sparsities(root), sizes, target, last), strict=True))


def allocate_time(
    scores: FisherScores,
    levels: Tensor,
    shapes: Mapping[str, tuple[int, int]],
    read: Mapping[str, float],
    latency: LatencyTable,
    target: float,
) -> dict[str, float]:
    """Sparsity of each Linear by one λ, so that all together save the time that the target everywhere would save.

    What a dropped channel of a Linear saves is its curve's mean slope up to the target.

    Args:
        scores, levels, read: as for `allocate`.
        shapes: (N, K) by qualified name.
        latency: curves of these shapes.
        target: as for `allocate`.

    Raises:
        ValueError: for a target out of range.
        ScheduleError: a shape is not in the table.
    """
    at = levels.double().numpy()
    if not 0 <= target <= at[-1]:
        raise ValueError(f"the target sparsity must be from 0 to {at[-1]:.6g}, found {target!r}")
    # An expert's time counts for the share of tokens that it gets.
    share = np.array([read[name] / math.prod(shapes[name]) for name in read])
    saved = share[:, None] * latency.savings({name: shapes[name] for name in read}, at)
    wanted = np.array([np.interp(target, at, curve) for curve in saved])
    if wanted.sum() <= 0:
        return dict.fromkeys(read, target)
    inputs = np.array([shapes[name][1] for name in read])
    scale = np.sqrt(np.maximum(wanted / share / inputs, 1e-12))
    curves = [scores.thresholds[name].double().numpy() for name in read]

    def sparsities(root: float) -> np.ndarray:
        return np.array([np.interp(root * each, curve, at) for each, curve in zip(scale, curves, strict=True)])

    def time(root: float) -> float:
        each = zip(sparsities(root), saved, strict=True)
        return float(sum(np.interp(sparsity, at, curve) for sparsity, curve in each))

    most = max(curve[-1] / each for each, curve in zip(scale, curves, strict=True))
    return dict(zip(read, map(float, sparsities(_solve(time, float(wanted.sum()), most))), strict=True))


def fisher_schedule(
    scores: FisherScores,
    levels: Tensor,
    shapes: Mapping[str, tuple[int, int]],
    sparsities: Mapping[str, float],
    metadata: ScheduleMetadata,
) -> Schedule:
    """The schedule with these sparsities and t_j = τ / g_j; a channel with g_j = 0 is always dropped."""
    linears = {}
    for name in shapes:
        threshold = float(
            np.interp(sparsities[name], levels.double().numpy(), scores.thresholds[name].double().numpy())
        )
        weights = scores.weights[name]
        channels = torch.where(weights > 0, threshold / weights, math.inf if threshold else 0.0)
        linears[name] = LinearSchedule(sparsities[name], threshold, 1.0, channels)
    return Schedule(linears, shapes, metadata=metadata)


def _solve(mean: Callable[[float], float], target: float, most: float) -> float:
    """The root that gives the target, by bisection; `mean` never falls."""
    low, high = 0.0, most
    for _ in range(80):
        middle = (low + high) / 2
        if mean(middle) < target:
            low = middle
        else:
            high = middle
    return high


def _settled(sparsities: np.ndarray, sizes: np.ndarray, target: float, last: float) -> np.ndarray:
    """Take back what equal scores overshot, in proportion, so that the budget is met exactly."""
    excess = float(sizes @ sparsities / sizes.sum()) - target
    if excess > 0:
        sparsities = sparsities * (target / (target + excess))
    return np.clip(sparsities, 0.0, last)

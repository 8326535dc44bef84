"""Meeting a budget exactly: the nearest levels within bounds whose weighted mean is the target."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

Vector = NDArray[np.float64]


def check_budget(target: float, weights: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> None:
    """Refuse bounds that the target cannot be met in.

    Args:
        target: weighted mean of the levels, above 0 and below 1.
        weights: number of weights of each entry, [D], positive.
        lower: smallest level of each entry, [D] or a scalar.
        upper: largest level of each entry, [D] or a scalar.

    Raises:
        ValueError: naming the target and what the bounds allow.
    """
    weight, low, high = _arrays(weights, lower, upper)
    if not 0 < target < 1:
        raise ValueError(f"the target sparsity must be above 0 and below 1, found {target!r}; give for example 0.5")
    if weight.size == 0 or not (weight > 0).all():
        raise ValueError(f"a budget needs entries with a positive number of weights, found {weight.tolist()}")
    if not ((low >= 0) & (low <= high) & (high < 1)).all():
        raise ValueError(
            f"bounds must be 0 ≤ lower ≤ upper < 1, found lower from {low.min():.4g} to {low.max():.4g} "
            f"and upper from {high.min():.4g} to {high.max():.4g}"
        )
    least, most = (float(np.average(bound, weights=weight)) for bound in (low, high))
    if not least - 1e-12 <= target <= most + 1e-12:
        raise ValueError(
            f"no allocation meets the target {target:.6g}: the bounds allow {least:.6g} to {most:.6g}; "
            "widen the bounds or change the target"
        )


def project(point: ArrayLike, weights: ArrayLike, target: float, lower: ArrayLike, upper: ArrayLike) -> Vector:
    """The levels nearest to `point` (in the weighted Euclidean distance) that meet the budget.

    Minimises Σ wᵢ (sᵢ − zᵢ)² over lower ≤ s ≤ upper with Σ wᵢ sᵢ = target · Σ wᵢ. The answer is
    clip(z + λ, lower, upper): with equal bounds for all, the order of the entries survives.

    Args:
        point: z, [D], any finite numbers.
        weights, target, lower, upper: as for `check_budget`.

    Returns:
        [D], float64; the weighted mean is the target up to rounding.

    Raises:
        ValueError: as `check_budget`.
    """
    check_budget(target, weights, lower, upper)
    weight, low, high = _arrays(weights, lower, upper)
    weight = weight / weight.sum()
    z = np.asarray(point, dtype=np.float64)
    # The weighted mean of clip(z + λ) rises with λ and is linear between these breakpoints.
    breakpoints = np.unique(np.concatenate([low - z, high - z]))
    means = [float(weight @ np.clip(z + at, low, high)) for at in breakpoints]
    levels = np.clip(z + np.interp(target, means, breakpoints), low, high)
    return _settle(levels, weight, target, low, high)


def rising(point: ArrayLike, weights: ArrayLike) -> Vector:
    """The levels nearest to `point` that never fall, by isotonic regression weighted with the weights.

    Args:
        point: z, [D], any finite numbers.
        weights: number of weights of each entry, [D], positive.

    Returns:
        [D], float64.
    """
    z, weight = np.asarray(point, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    return isotonic_regression(z, weights=weight).x


def _settle(levels: Vector, weight: Vector, target: float, low: Vector, high: Vector) -> Vector:
    """Spread what rounding left of the budget over the entries that have room."""
    for _ in range(3):
        residual = target - float(weight @ levels)
        room = (levels < high) if residual > 0 else (levels > low)
        if residual == 0 or not room.any():
            break
        levels = np.where(room, np.clip(levels + residual / weight[room].sum(), low, high), levels)
    return levels


def _arrays(weights: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> tuple[Vector, Vector, Vector]:
    weight = np.asarray(weights, dtype=np.float64)
    low, high = (np.broadcast_to(np.asarray(bound, dtype=np.float64), weight.shape) for bound in (lower, upper))
    return weight, low, high

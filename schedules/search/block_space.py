"""Where a search over blocks looks: free coordinates, decoded to block levels that meet the budget exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre

from was_fx.schedules.projection import Vector, check_budget, project, rising


@dataclass(frozen=True, eq=False)
class BlockSpace:
    """Block levels as a function of d free coordinates, each from −1 to 1.

    levels = project(rising(center + reach · basisᵀ z)). With fewer coordinates than blocks the basis holds smooth
    profiles over depth (Legendre polynomials), so a search has few dimensions however deep the model is; the first is
    the linear ramp.

    Attributes:
        weights: number of weights of each block, [D].
        target: model sparsity to meet.
        lower: smallest level of each block, [D].
        upper: largest level of each block, [D].
        basis: profile of each coordinate over the blocks, [d, D].
        center: levels at z = 0, before projection, [D].
        monotone: levels must not fall over depth; without it, `rising` is left out.
    """

    weights: Vector
    target: float
    lower: Vector
    upper: Vector
    basis: Vector
    center: Vector
    monotone: bool = False

    def __post_init__(self) -> None:
        check_budget(self.target, self.weights, self.lower, self.upper)

    @property
    def dimension(self) -> int:
        """Number of free coordinates."""
        return len(self.basis)

    def decode(self, z: Vector) -> Vector:
        """Block levels [D] of coordinates [d]: within the bounds, the budget met up to rounding."""
        reach = float(np.max(self.upper - self.lower))
        point = self.center + reach * (np.asarray(z, dtype=np.float64) @ self.basis)
        if self.monotone:
            point = rising(point, self.weights)
        return project(point, self.weights, self.target, self.lower, self.upper)

    def encode(self, levels: Vector) -> Vector:
        """The coordinates [d] whose profile is nearest to these levels [D], within −1 to 1."""
        reach = max(float(np.max(self.upper - self.lower)), 1e-12)
        offset = (np.asarray(levels, dtype=np.float64) - self.center) / reach
        return np.clip(np.linalg.lstsq(self.basis.T, offset, rcond=None)[0], -1.0, 1.0)


def block_space(
    weights: Sequence[float],
    target: float,
    margin: float,
    *,
    limit: float = 0.95,
    dimension: int | None = None,
    monotone: bool = False,
    center: Vector | None = None,
) -> BlockSpace:
    """The space of levels within `margin` of the center.

    Args:
        weights: number of weights of each of D blocks.
        target: model sparsity, above 0 and below 1.
        margin: half the width of the box around the center.
        limit: highest level of any block.
        dimension: number of coordinates; by default one per block.
        monotone: levels must not fall over depth.
        center: levels at z = 0, [D]; by default the target for all.

    Raises:
        ValueError: the target is out of range, the bounds can't meet it, or a setting is out of range.
    """
    count = len(weights)
    if not 0 < margin < 1:
        raise ValueError(f"the margin must be above 0 and below 1, found {margin!r}")
    full = dimension is None or dimension >= count
    middle = np.full(count, target) if center is None else np.asarray(center, dtype=np.float64)
    return BlockSpace(
        weights=np.asarray(weights, dtype=np.float64),
        target=target,
        lower=np.maximum(middle - margin, 0.0),
        upper=np.minimum(middle + margin, limit),
        basis=np.eye(count) if full else _profiles(count, int(dimension or 1)),
        center=middle,
        monotone=monotone,
    )


def _profiles(count: int, dimension: int) -> Vector:
    """Legendre polynomials of degree 1 to `dimension` over the depth, each at most 1 in size: [dimension, count]."""
    depth = np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)
    return np.asarray(legendre.legvander(depth, dimension)[:, 1:].T, dtype=np.float64)

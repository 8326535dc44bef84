"""An exact solver: from each Linear's loss and saving at each level to the cheapest allocation within a budget.

Each Linear is a curve of points (saving, loss), one per level. On the lower convex hulls of these curves the best
allocation takes hull segments in the order of loss per saving until the budget is full: the solution of the linear
programme, of which at most one Linear lies between two points of its hull.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from was_fx.schedules.projection import Vector


@dataclass(frozen=True, eq=False)
class Curves:
    """What each of D Linears loses and saves at each of G levels.

    Attributes:
        levels: sparsities, [G], increasing.
        losses: rise of the loss over level 0, [D, G].
        savings: what is not read, or the time that is not spent, at each level, [D, G], any unit, nondecreasing.
    """

    levels: Vector
    losses: Vector
    savings: Vector

    def saved(self, sparsities: Vector) -> float:
        """What an allocation [D] saves, linear between levels."""
        each = [np.interp(s, self.levels, curve) for s, curve in zip(sparsities, self.savings, strict=True)]
        return float(sum(each))


def solve(curves: Curves, budget: float, lower: Vector, upper: Vector) -> Vector:
    """The allocation of least total loss that saves `budget`.

    Args:
        curves: of D Linears.
        budget: in the unit of the savings.
        lower: smallest sparsity of each Linear, [D].
        upper: largest sparsity of each Linear, [D].

    Returns:
        Sparsities, [D]. Exact for convex curves; a curve that is not is replaced by its lower convex hull.

    Raises:
        ValueError: if the bounds do not allow the budget.
    """
    paths = [_hull(curves, index, lower[index], upper[index]) for index in range(len(curves.losses))]
    result = np.array([path[0][2] for path in paths])
    left = budget - sum(path[0][0] for path in paths)
    room = sum(path[-1][0] - path[0][0] for path in paths)
    slack = 1e-9 * max(abs(budget), 1.0)
    if left < -slack or left > room + slack:
        raise ValueError(
            f"no allocation saves {budget:.6g}: the bounds allow {budget - left:.6g} to {budget - left + room:.6g}; "
            "widen the bounds or change the target"
        )
    queue = [(_slope(path, 0), index, 0) for index, path in enumerate(paths) if len(path) > 1]
    heapq.heapify(queue)
    while queue and left > 0:
        _, index, step = heapq.heappop(queue)
        (saved_from, _, low), (saved_to, _, high) = paths[index][step], paths[index][step + 1]
        share = min(1.0, left / (saved_to - saved_from))
        result[index] = low + share * (high - low)
        left -= share * (saved_to - saved_from)
        if step + 2 < len(paths[index]):
            heapq.heappush(queue, (_slope(paths[index], step + 1), index, step + 1))
    return result


def _hull(curves: Curves, index: int, low: float, high: float) -> list[tuple[float, float, float]]:
    """Lower convex hull of the points (saving, loss, level) of one Linear between two levels, by saving."""
    inside = curves.levels[(curves.levels > low) & (curves.levels < high)]
    levels = np.unique(np.concatenate([[low], inside, [high]]))
    savings = np.interp(levels, curves.levels, curves.savings[index])
    losses = np.interp(levels, curves.levels, curves.losses[index])
    hull: list[tuple[float, float, float]] = []
    for point in zip(savings.tolist(), losses.tolist(), levels.tolist(), strict=True):
        if hull and point[0] <= hull[-1][0]:
            continue  # saves nothing more
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-2], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def _slope(path: list[tuple[float, float, float]], step: int) -> float:
    (saved_from, loss_from, _), (saved_to, loss_to, _) = path[step], path[step + 1]
    return (loss_to - loss_from) / (saved_to - saved_from)

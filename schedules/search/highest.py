"""The highest sparsity whose cost stays within a budget, found by few measurements."""

import math
from collections.abc import Callable, Iterable

# Interpolations before the bracket is simply halved.
_INTERPOLATIONS = 6
# Cost above that at 0 grows about so with sparsity s, as s^3.5, where only one point is known.
_POWER = 3.5


def highest_within(
    cost: Callable[[float], float],
    budget: float,
    *,
    grid: Iterable[float] = (0.25, 0.4, 0.5),
    precision: float = 0.01,
    limit: float = 0.9,
) -> float | None:
    """The highest sparsity measured whose cost is within the budget, next to one that is not.

    Every sparsity of the grid is measured, then those between the last that is within the budget and the first that is
    not. Sparsities are whole thousandths, so that the same cost leads to the same ones.

    Args:
        cost: measures a sparsity; it should not fall as sparsity grows. Called once for each.
        budget: what it may be.
        grid: sparsities above 0.
        precision: how near to the answer one must be that is too high.
        limit: the highest sparsity to try.

    Returns:
        The sparsity; 0.0 if only that is within the budget, None if not even that is.
    """
    known = {0.0: cost(0.0)}
    if known[0.0] > budget:
        return None
    known |= {sparsity: cost(sparsity) for sparsity in sorted({round(each, 3) for each in grid if each <= limit})}
    if all(each <= budget for each in known.values()):
        known[limit] = cost(limit)
    for step in range(20):
        high = min((sparsity for sparsity, each in known.items() if each > budget), default=None)
        if high is None:
            return limit
        low = max(sparsity for sparsity in known if sparsity < high)
        if high - low <= precision + 1e-9:
            return low
        middle = (low + high) / 2
        guess = _crossing(low, high, known, budget) if step < _INTERPOLATIONS else middle
        # Aimed at just below the crossing, and once that is known, just above.
        aim = guess - 0.4 * precision
        aim = aim if aim > low + 0.1 * precision else guess + 0.4 * precision
        probe = round(min(max(aim, low + 0.4 * precision), high - 0.4 * precision), 3)
        if probe in known:
            probe = round(middle, 3)
        if probe in known:
            return low
        known[probe] = cost(probe)
    return low


def _crossing(low: float, high: float, known: dict[float, float], budget: float) -> float:
    """Where a power law of sparsity through both ends meets the budget."""
    room, at_low, at_high = (each - known[0.0] for each in (budget, known[low], known[high]))
    if at_high <= 0 or room <= 0:
        return (low + high) / 2
    power = _POWER
    if low > 0 and at_low > 0 and at_high > at_low:
        power = math.log(at_high / at_low) / math.log(high / low)
    return min(max(high * (room / at_high) ** (1 / power), low), high)

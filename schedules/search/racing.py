"""Stopping hopeless candidates early: a paired test against the incumbent on the windows seen so far."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

# Chance of dropping a candidate that is as good as the incumbent, per look at it.
SIGNIFICANCE = 0.01
# Windows before the first look: fewer say little about the spread of the differences.
FIRST_LOOK = 3


def is_hopeless(losses: Sequence[float], incumbent: Sequence[float]) -> bool:
    """Whether a candidate is worse than the incumbent, by a one-sided paired t-test over the same windows.

    Differences between two schedules on one window vary far less than losses between windows, so a few windows tell.

    Args:
        losses: the candidate's mean loss on each window so far, nats per token.
        incumbent: the incumbent's on the same windows first; may be longer. Empty: nothing to compare with.
    """
    seen = len(losses)
    if seen < FIRST_LOOK or len(incumbent) < seen:
        return False
    differences = np.subtract(losses, incumbent[:seen])
    mean, spread = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(seen)
    return mean > 0 and (spread == 0 or bool(student.sf(mean / spread, seen - 1) < SIGNIFICANCE))


def estimate(losses: Sequence[float], incumbent: Sequence[float]) -> float:
    """Mean loss over all windows; for a candidate that was stopped, the incumbent's plus the mean difference so far.

    Args:
        losses: the candidate's mean loss on the windows it saw, nats per token; at least one.
        incumbent: the incumbent's that it was compared with; empty if there was none.
    """
    seen = len(losses)
    if len(incumbent) <= seen:
        return float(np.mean(losses))
    return float(np.mean(incumbent) + np.mean(np.subtract(losses, incumbent[:seen])))

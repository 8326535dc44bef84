"""TEAL's greedy allocation inside a block: one descent gives the whole table of levels.

From no sparsity at all, the Linear whose extra sparsity hurts the block's output least takes one step, again and
again. A step is scaled by the Linear's number of weights, so that every step saves the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from was_fx.schedules.blocks import Block
from was_fx.schedules.search.level_table import LevelTable, from_rows

# How far the block's output is off with each of these sparsities of its Linears, in any unit.
BlockErrors = Callable[[Sequence[Mapping[str, float]]], Sequence[float]]


@dataclass(frozen=True)
class Greedy:
    """Settings of the descent.

    Attributes:
        step: sparsity that one step adds to a Linear of the block's mean size.
        limit: highest sparsity of a Linear, below 1.
        shares: count a projection (the last component of its name) as this share of its true number of weights;
            only for repeating a paper whose accounting differs.

    Raises:
        ValueError: for a step or limit out of range.
    """

    step: float = 0.025
    limit: float = 0.95
    shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.limit < 1:
            raise ValueError(
                f"greedy needs 0 < step ≤ limit < 1, found a step of {self.step} and a limit of {self.limit}"
            )


def greedy_table(block: Block, errors: BlockErrors, settings: Greedy = Greedy(), *, until: float = 1.0) -> LevelTable:
    """The level table of a block.

    Args:
        block: its Linears.
        errors: called with all candidates of a step at once; each gives all sparsities.
        settings: step and limit.
        until: stop once the block's level has reached this; by default go on until every Linear is at the limit.

    Returns:
        A `LevelTable` whose levels are by true numbers of weights, whatever `settings.shares` says.
    """
    names = tuple(block.shapes)
    counted = {name: block.weights[name] * _share(settings, name) for name in names}
    mean = sum(counted.values()) / len(names)
    steps = {name: min(settings.step * mean / counted[name], settings.limit) for name in names}
    current = dict.fromkeys(names, 0.0)
    rows = [list(current.values())]
    while _level(block, current) < until:
        candidates = [name for name in names if current[name] < settings.limit]
        if not candidates:
            break
        raised = {name: min(current[name] + steps[name], settings.limit) for name in candidates}
        found = errors([{**current, name: raised[name]} for name in candidates])
        best = candidates[int(np.argmin(found))]
        current[best] = raised[best]
        rows.append(list(current.values()))
    return from_rows(names, block.weights, rows)


def _level(block: Block, sparsities: Mapping[str, float]) -> float:
    return sum(block.weights[name] * sparsity for name, sparsity in sparsities.items()) / block.size


def _share(settings: Greedy, name: str) -> float:
    return (settings.shares or {}).get(name.rsplit(".", 1)[-1], 1.0)

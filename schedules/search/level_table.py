"""What each Linear of a block gets at a level of the block."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from was_fx.schedules.blocks import Block
from was_fx.schedules.projection import Vector


@dataclass(frozen=True, eq=False)
class LevelTable:
    """Sparsities of a block's Linears by level of the block.

    Attributes:
        names: qualified names of the Linears, P of them.
        levels: levels of the rows, [R], increasing from 0.
        rows: sparsities, [R, P]; their mean by `weights` is the row's level.
    """

    names: tuple[str, ...]
    levels: Vector
    rows: Vector

    def at(self, level: float, *, nearest: bool = False) -> dict[str, float]:
        """Sparsities at a level, linear between rows, so that their weighted mean is the level.

        Args:
            level: from 0 to that of the last row.
            nearest: give the row nearest to the level instead, as TEAL and WAS do; its level is another one.

        Raises:
            ValueError: for a level that the table does not reach.
        """
        if not 0 <= level <= self.levels[-1] + 1e-9:
            raise ValueError(
                f"the level table of {self.names[0]} … reaches {self.levels[-1]:.4g}, found a level of {level:.6g}; "
                "lower the bounds or make the table with a higher limit"
            )
        if nearest:
            row = self.rows[np.argmin(np.abs(self.levels - level))]
        else:
            row = np.array([np.interp(level, self.levels, column) for column in self.rows.T])
        return dict(zip(self.names, row.tolist(), strict=True))


def uniform_table(block: Block, limit: float) -> LevelTable:
    """Every Linear of the block gets the block's level, up to `limit`, above 0 and below 1: a table of two rows."""
    names = tuple(block.shapes)
    return from_rows(names, block.weights, [[0.0] * len(names), [limit] * len(names)])


def from_rows(names: tuple[str, ...], weights: Mapping[str, float], rows: list[list[float]]) -> LevelTable:
    """A table from its rows; levels are computed from the true numbers of weights.

    Args:
        names: qualified names of P Linears.
        weights: N·K by qualified name.
        rows: R rows of P sparsities, increasing from 0.
    """
    weight = np.array([weights[name] for name in names], dtype=np.float64)
    sparsities = np.array(rows, dtype=np.float64)
    return LevelTable(names, sparsities @ (weight / weight.sum()), sparsities)

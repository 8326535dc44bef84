"""The table that greedy search leaves for one block: the sparsity of each projection at each level of the block."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LEVEL = "Effective Sparsity"
_ERRORS = ("Activation Error", "Baseline Error")
# How far above its last row a table still answers: about a step of the search.
_BEYOND = 0.01


@dataclass(frozen=True)
class LookupTable:
    """Sparsities of a block's projections, a row per step of the greedy search.

    Attributes:
        levels: the block's sparsity at each row, by the weights that the release gives its projections.
        sparsities: of each row by projection. The last steps of a small projection may go to 1 and beyond.
    """

    levels: Sequence[float]
    sparsities: Sequence[Mapping[str, float]]

    def nearest(self, level: float) -> Mapping[str, float]:
        """The row whose level is nearest, as the releases choose it; the first of two equally near.

        Raises:
            ValueError: for a level that the table does not reach.
        """
        top = max(self.levels)
        if not 0 <= level <= top + _BEYOND:
            raise ValueError(f"the level {level:g} is outside the table, which reaches {top:.4g}")
        row = min(range(len(self.levels)), key=lambda index: abs(self.levels[index] - level))
        return self.sparsities[row]


def read_lookup(path: Path) -> LookupTable:
    """Read a `results.csv`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no such table; says the line.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"it is no CSV text ({error})") from error
    projections = [column for column in header if column not in (_LEVEL, *_ERRORS)]
    if _LEVEL not in header or not projections or len(set(header)) != len(header):
        expected = ",".join((_LEVEL, *_ERRORS, "q", "k", "v", "o", "gate", "up", "down"))
        raise ValueError(f"the columns are {','.join(header)[:80]!r}, expected {expected!r}")
    if not rows:
        raise ValueError("it has a header but no rows")
    read = [_row(header, row, line) for line, row in enumerate(rows, start=2)]
    return LookupTable([row[_LEVEL] for row in read], [{name: row[name] for name in projections} for row in read])


def _row(header: Sequence[str], row: Sequence[str], line: int) -> dict[str, float]:
    if len(row) != len(header):
        raise ValueError(f"line {line} has {len(row)} values, expected {len(header)}")
    values = {}
    for name, text in zip(header, row, strict=True):
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"line {line}: {name} is {text[:40]!r}, expected a number") from None
        if name not in _ERRORS and not (math.isfinite(values[name]) and values[name] >= 0):
            raise ValueError(f"line {line}: {name} is {text[:40]}, expected a finite number of at least 0")
    return values

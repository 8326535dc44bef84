"""Measured latency curves of a kernel, to spend sparsity where it saves time instead of bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.projection import Vector

_KEYS = ("n", "k", "sparsity", "us")


class LatencyTable:
    """Microseconds of one call of a Linear by its shape and sparsity.

    Args:
        rows: objects with `n`, `k` (the shape [N, K]), `sparsity` from 0 to 1 and `us`; of several rows for one
            shape and sparsity the fastest counts.

    Raises:
        ScheduleError: a row lacks a number or has one out of range, or there are none.
    """

    def __init__(self, rows: list[Mapping[str, Any]]) -> None:
        problems = [f"row {at}: {problem}" for at, row in enumerate(rows, 1) if (problem := _problem(row))]
        if problems or not rows:
            remedy = 'Expected JSON lines such as {"n": 4096, "k": 4096, "sparsity": 0.5, "us": 8.2}.'
            raise ScheduleError("the latency table cannot be used", problems or ["it has no rows"], remedy)
        self._curves: dict[tuple[int, int], dict[float, float]] = {}
        for row in rows:
            curve = self._curves.setdefault((int(row["n"]), int(row["k"])), {})
            sparsity, us = float(row["sparsity"]), float(row["us"])
            curve[sparsity] = min(us, curve.get(sparsity, us))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a JSON array, or JSON lines, of rows; lines that are no row of a kernel (without `us`) are skipped.

        Raises:
            OSError: the file can't be read.
            ScheduleError: it is not JSON, or its rows are not valid.
        """
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x]
        except ValueError as error:
            remedy = "Give the JSON lines that benchmarks/gpu_kernels.py prints."
            raise ScheduleError(f"{path} is not a latency table ({error})", remedy=remedy) from error
        return cls([row for row in rows if not isinstance(row, dict) or "us" in row])

    def savings(self, shapes: Mapping[str, tuple[int, int]], levels: Vector) -> Vector:
        """Microseconds that each Linear saves at each sparsity against its own lowest measured one.

        Args:
            shapes: (N, K) of D Linears.
            levels: sparsities, [G], increasing.

        Returns:
            [D, G], nondecreasing along the levels; constant outside the measured sparsities.

        Raises:
            ScheduleError: naming every shape that has fewer than two measured sparsities.
        """
        missing = {shape for shape in shapes.values() if len(self._curves.get(shape, ())) < 2}
        if missing:
            problems = [f"[{n}, {k}] has {len(self._curves.get((n, k), ()))} sparsities" for n, k in sorted(missing)]
            raise ScheduleError("the latency table lacks shapes of the model", problems, "Measure these shapes too.")
        return np.stack([self._saved(shape, levels) for shape in shapes.values()])

    def _saved(self, shape: tuple[int, int], levels: Vector) -> Vector:
        measured = sorted(self._curves[shape].items())
        us = np.interp(levels, [sparsity for sparsity, _ in measured], [time for _, time in measured])
        return np.maximum.accumulate(us[0] - us)


def byte_savings(shapes: Mapping[str, tuple[int, int]], levels: Vector) -> Vector:
    """Weights that each Linear does not read at each sparsity, [D, G]."""
    return np.array([n * k for n, k in shapes.values()], dtype=np.float64)[:, None] * levels


def _problem(row: Any) -> str:
    if not isinstance(row, Mapping):
        return f"expected an object, found {row!r:.60}"
    wrong = [key for key in _KEYS if isinstance(row.get(key), bool) or not isinstance(row.get(key), (int, float))]
    if wrong:
        return f"no number for {', '.join(wrong)}"
    if not (0 <= row["sparsity"] <= 1 and 0 < row["us"] < np.inf and row["n"] > 0 and row["k"] > 0):
        return f"a number is out of range in {dict(row)}"
    return ""

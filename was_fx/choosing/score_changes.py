"""`score_change`: what a task's metric lost against the dense model, and how sure that is."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScoreChange:
    """A metric's change.

    Attributes:
        change: the metric less the dense model's, in the metric's own unit: an accuracy's 0.01 is a point.
        error: standard error of that; None where it is not known.
        paired: whether the error is of the differences document by document, which is less than that of both errors
            together where both models are right about the same documents.
    """

    change: float
    error: float | None
    paired: bool

    @property
    def errors(self) -> float | None:
        """The change in standard errors; None where there is none."""
        return self.change / self.error if self.error else None


def score_change(found: Mapping[str, Any], dense: Mapping[str, Any], metric: str) -> ScoreChange:
    """Compare the results of one task.

    Args:
        found, dense: results as `run_tasks(…, documents=True)` gives them.
        metric: a key of both, such as "acc,none".
    """
    change = float(found[metric]) - float(dense[metric])
    values = [each.get("documents", {}).get(metric) for each in (found, dense)]
    if all(values) and len(values[0]) == len(values[1]) > 1:
        return ScoreChange(change, _error(values[0], values[1]), True)
    errors = [each.get(error_key(metric)) for each in (found, dense)]
    if all(isinstance(each, float) and not math.isnan(each) for each in errors):
        return ScoreChange(change, math.hypot(*errors), False)  # type: ignore[arg-type]  # floats
    return ScoreChange(change, None, False)


def error_key(metric: str) -> str:
    """The key of a metric's standard error: "acc_stderr,none" of "acc,none"."""
    name, comma, rest = metric.partition(",")
    return f"{name}_stderr{comma}{rest}"


def metrics_of(found: Mapping[str, Any]) -> list[str]:
    """The metrics among the results of one task: what is a number and no standard error."""
    return [
        key
        for key, value in found.items()
        if isinstance(value, float) and "_stderr," not in key and not key.endswith("_stderr")
    ]


def first_metric(found: Mapping[str, Any]) -> str | None:
    """The one that averages over tasks are of: acc_norm where there is one, else the first."""
    metrics = metrics_of(found)
    return next((each for each in metrics if each.startswith("acc_norm,")), metrics[0] if metrics else None)


def _error(one: Sequence[float], other: Sequence[float]) -> float:
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))

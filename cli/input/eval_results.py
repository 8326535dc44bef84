"""What `was eval --json` printed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from was_fx.cli.input.files import short_name


@dataclass(frozen=True)
class Score:
    """A metric's value and, where it has one, its standard error."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskResults:
    """One file.

    Attributes:
        setting: model and how it was measured, in a sentence.
        names: "dense" and the schedules' names, behind that of a format of weights, in the file's order.
        scores: by (task, metric) and name.
    """

    setting: str
    names: tuple[str, ...]
    scores: Mapping[tuple[str, str], Mapping[str, Score]]


def read_eval(path: Path) -> TaskResults:
    """The results in a file.

    Raises:
        ValueError: it holds something else.
        OSError: it can't be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores: dict[tuple[str, str], dict[str, Score]] = {}
        names = []
        for row in content["results"]:
            names.append(_name(row))
            for task, metrics in row["tasks"].items():
                for metric, score in _scores(metrics).items():
                    scores.setdefault((task, metric), {})[names[-1]] = score
        limit = f", the first {content['limit']} documents of each" if content.get("limit") else ""
        setting = f"{content['model']}, prefill {content['prefill']}{limit}; lm-eval's tasks."
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what was eval --json prints ({error!r}); make it with: was eval MODEL --schedule FILE "
            "--json > eval.json"
        ) from error
    if not scores:
        raise ValueError(f"{path} holds no score of a task; make it with: was eval MODEL --json > eval.json")
    return TaskResults(setting, tuple(names), scores)


def _name(row: Mapping[str, Any]) -> str:
    name = "dense" if row["schedule"] is None else short_name(row["schedule"])
    return f"{row['weights']}, {name}" if row.get("weights") else name


def _scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """Metrics as lm-eval names them, `acc,none` with `acc_stderr,none`, by their short names."""
    found = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if (
            metric.endswith("_stderr")
            or metric == "sample_len"
            or not isinstance(value, (int, float))
            or isinstance(value, bool)
        ):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        short = metric if filtered in ("", "none") else f"{metric} ({filtered})"
        found[short] = Score(float(value), float(error) if isinstance(error, (int, float)) else None)
    return found

"""What `was compare` reads: schedules, the results of `was ppl --json`, and the trials of searches."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_fx.cli.input.files import load_schedule
from was_fx.schedules.budget import model_sparsity
from was_fx.schedules.names import split_name

if TYPE_CHECKING:
    from was_fx import Schedule

_SETTING = ("model", "text", "prefill", "length")
_LATER = ("weights", "convention")  # which older files don't have


@dataclass(frozen=True)
class Measured:
    """One row of `was ppl --json`.

    Attributes:
        perplexity: on its text.
        nominal: the schedule's model sparsity.
        realised: the model sparsity on the text.
        bytes_saved: share of all weight bytes of a decode step that were not read.
    """

    perplexity: float
    nominal: float
    realised: float
    bytes_saved: float


@dataclass(frozen=True)
class Results:
    """The results of one or several `was ppl --json` in one setting.

    Attributes:
        setting: model, text, prefill, length of windows and formats of weights.
        dense: the dense model's row, if it was measured.
        rows: by the schedule's path as it was given to `was ppl`.
    """

    setting: Mapping[str, Any]
    dense: Measured | None
    rows: Mapping[str, Measured]

    def of(self, name: str, schedule: "Schedule") -> Measured | None:
        """The row of a schedule, by its path or else by its file name; None if it was not measured.

        Raises:
            ValueError: the row is that of another schedule in a file of this name.
        """
        row = self.rows.get(name)
        if row is None:
            same = [key for key in self.rows if Path(key).name == Path(name).name]
            row = self.rows[same[0]] if len(same) == 1 else None
        if row is not None and abs(row.nominal - schedule.sparsity) > 1e-6:
            raise ValueError(
                f"{name} has a nominal sparsity of {schedule.sparsity:.6f}, but was measured with {row.nominal:.6f}: "
                "it has changed since; run was ppl --json again"
            )
        return row


@dataclass(frozen=True)
class Compared:
    """A schedule as it is compared.

    Attributes:
        name: its path or published name.
        schedule: the schedule.
        measured: its row of `was ppl --json`, if there is one.
        blocks: mean sparsity of each block, weighted by N·K.
        projections: the same of each projection over the blocks; of a Linear outside the blocks its own.
    """

    name: str
    schedule: "Schedule"
    measured: Measured | None
    blocks: Mapping[str, float]
    projections: Mapping[str, float]


@dataclass(frozen=True)
class Trials:
    """The trials of one search, in their order.

    Attributes:
        path: their file.
        indices: as the file numbers them.
        losses: nats per token; NaN or infinite where a trial has no value.
        target: the model sparsity searched for, if the file says.
    """

    path: Path
    indices: Sequence[int]
    losses: Sequence[float]
    target: float | None

    @property
    def best(self) -> tuple[int, float]:
        """(index, loss) of the lowest loss, the first of equals."""
        finite = [(loss, position) for position, loss in enumerate(self.losses) if math.isfinite(loss)]
        loss, position = min(finite)
        return self.indices[position], loss


def read_schedule(name: str, results: Results | None) -> Compared:
    """The schedule in a file, or else the published one of this name, with its row of the results.

    Raises:
        ValueError, OSError: there is neither, or the row is that of another schedule.
    """
    schedule = load_schedule(Path(name))
    blocks: dict[str, dict[str, float]] = defaultdict(dict)
    projections: dict[str, dict[str, float]] = defaultdict(dict)
    for linear, entry in schedule.linears.items():
        block, projection = split_name(linear)
        projections[projection][linear] = entry.sparsity
        if block is not None:
            blocks[linear.removesuffix(f".{projection}")][linear] = entry.sparsity
    return Compared(
        name,
        schedule,
        None if results is None else results.of(name, schedule),
        {key: model_sparsity(group, schedule.shapes) for key, group in blocks.items()},
        {key: model_sparsity(group, schedule.shapes) for key, group in projections.items()},
    )


def read_results(paths: Sequence[Path]) -> Results | None:
    """What `was ppl --json` printed, from one or several files; None without files.

    Raises:
        ValueError: a file holds something else, or files are of different settings and can't be compared.
        OSError: a file can't be read.
    """
    found: list[Results] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = {row["schedule"]: _measured(row) for row in content["results"]}
            found.append(Results(_setting(content), rows.pop(None, None), rows))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not what was ppl --json prints ({error!r}); "
                "make it with: was ppl MODEL --schedule FILE --json > ppl.json"
            ) from error
        for key, value in found[0].setting.items():
            if value != found[-1].setting[key]:
                raise ValueError(
                    f"{paths[0]} and {path} cannot be compared: the {key} is {value!r} in one and "
                    f"{found[-1].setting[key]!r} in the other"
                )
    if not found:
        return None
    dense = next((each.dense for each in found if each.dense is not None), None)
    return Results(found[0].setting, dense, {key: row for each in found for key, row in each.rows.items()})


def read_trials(path: Path) -> Trials:
    """The trials in a file of JSON lines: `index` and `loss`, or `trial` ("trial 7") and the `losses` of its windows.

    A trial with fewer windows than others was given up and has no loss. Other lines (settings, probes) and a last
    line that a kill left unfinished are passed over.

    Raises:
        ValueError: another line is no JSON object, or no trial has a finite loss.
        OSError: the file can't be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line or "{}"))
            if not isinstance(objects[-1], dict):
                raise ValueError(f"a {type(objects[-1]).__name__}, not an object")
        except ValueError as error:
            if number == len(lines):
                objects = [each for each in objects if isinstance(each, dict)]
                break
            raise ValueError(f"{path}, line {number}: expected one JSON object per trial ({error})") from error
    found = {index: losses for index, losses in map(_trial, objects) if index is not None}
    windows = max(map(len, found.values()), default=0)
    indices = sorted(found)
    losses = [math.fsum(found[index]) / windows if len(found[index]) == windows else math.nan for index in indices]
    if not any(map(math.isfinite, losses)):
        raise ValueError(f"{path} holds no trial with a loss; expected the JSON lines that a search writes")
    settings = [each.get("settings", each) for each in objects]
    targets = [each["target"] for each in settings if isinstance(each, dict) and isinstance(each.get("target"), float)]
    return Trials(path, indices, losses, targets[0] if targets else None)


def _trial(record: Mapping[str, Any]) -> tuple[int | None, list[float]]:
    """(index, loss of each window) of a line; (None, []) if it is no trial."""
    index, losses = record.get("index"), record.get("losses")
    kind, _, number = str(record.get("trial")).partition(" ")
    if index is None and kind == "trial" and number.isdecimal():
        index = int(number)
    if not isinstance(index, int):
        return None, []
    if isinstance(losses, list) and losses and "loss" not in record:
        return index, [_number(loss) for loss in losses]
    return (index, [_number(record["loss"])]) if "loss" in record else (None, [])


def _setting(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in _SETTING} | {key: content.get(key) for key in _LATER}


def _measured(row: Mapping[str, Any]) -> Measured:
    shares = (float(row[key]) for key in ("nominal", "realised", "bytes_saved"))
    return Measured(_number(row["perplexity"]), *shares)  # null stands for an infinite perplexity


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan

"""Schedule: what each Linear of a model drops, and its file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from was_fx.schedules.budget import model_sparsity
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import group_of
from was_fx.schedules.files import storage
from was_fx.schedules.files.fingerprint import differences
from was_fx.schedules.files.linear_schedule import LinearSchedule, schedule_problems
from was_fx.schedules.files.metadata import MetadataReader, to_json
from was_fx.schedules.files.schedule_file import pack_linears, unpack_linears
from was_fx.schedules.files.schedule_metadata import ScheduleMetadata
from was_fx.schedules.names import suggestion, unknown_problems
from was_fx.schedules.score import Score


@dataclass(frozen=True)
class Schedule:
    """Sparsity, threshold and exponent of each scheduled Linear. Equal iff all numbers and metadata are.

    Attributes:
        linears: the entries by qualified name; iteration keeps the order given.
        shapes: (N, K) by qualified name, for the same names.
        norm: p of the channel norms that the thresholds were made with, 1 or 2.
        metadata: where the schedule comes from.

    Raises:
        ScheduleError: with every number that is NaN, negative or out of range, and every name or shape
            that does not fit.
    """

    linears: Mapping[str, LinearSchedule]
    shapes: Mapping[str, tuple[int, int]]
    norm: int = 1
    metadata: ScheduleMetadata = field(default_factory=ScheduleMetadata)

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", dict(self.linears))
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})
        problems = schedule_problems(self.linears, self.shapes) + _setting_problems(self.norm, self.metadata)
        if problems:
            raise ScheduleError("the schedule is not valid", problems, "Correct these numbers.")

    @property
    def sparsity(self) -> float:
        """Nominal model sparsity: the mean over the scheduled Linears, weighted by N·K."""
        return model_sparsity(
            {name: linear.sparsity for name, linear in self.linears.items()},
            self.shapes,
            self.metadata.experts_per_token,
        )

    def score(self, name: str) -> Score:
        """The score that the threshold of Linear `name` is compared with; ValueError for an unknown name."""
        if name not in self.linears:
            raise ValueError(f"{name} is not scheduled{suggestion(name, self.linears)}")
        return Score(self.linears[name].exponent, self.norm)

    def replace(self, linears: Mapping[str, LinearSchedule], **metadata: Any) -> "Schedule":
        """A schedule with other entries for some scheduled Linears and other values for some metadata fields.

        Raises:
            ScheduleError: for a Linear that is not scheduled, or numbers out of range.
        """
        unknown = [name for name in linears if name not in self.linears]
        if unknown:
            problems = unknown_problems(unknown, self.linears, "is not scheduled")
            raise ScheduleError("these entries cannot be replaced", problems, "Give scheduled Linears.")
        changed = dataclasses.replace(self.metadata, **metadata)
        return Schedule({**self.linears, **linears}, self.shapes, self.norm, changed)

    def renamed(self, names: Mapping[str, str]) -> "Schedule":
        """The same schedule of a model whose Linears have other names.

        Args:
            names: the new name of every scheduled Linear by its old one; what it leaves out of the metadata's names is
                left out of the result.
        """
        about = self.metadata
        groups = {group_of(old): group_of(new) for old, new in names.items()}
        weights = about.weights
        metadata = dataclasses.replace(
            about,
            excluded=tuple(names[name] for name in about.excluded if name in names),
            weights=None if weights is None else {names[name]: each for name, each in weights.items() if name in names},
            experts_per_token={groups[name]: each for name, each in about.experts_per_token.items() if name in groups},
        )
        linears = {names[name]: each for name, each in self.linears.items()}
        return Schedule(linears, {names[name]: each for name, each in self.shapes.items()}, self.norm, metadata)

    def check(
        self,
        shapes: Mapping[str, tuple[int, int]],
        fingerprint: Mapping[str, Any] | None = None,
        *,
        allow_other_model: bool = False,
    ) -> None:
        """Refuse a model that this schedule does not fit.

        Args:
            shapes: (N, K) of every Linear of the model that can be scheduled, by qualified name. The ones
                that the metadata names as excluded need no entry.
            fingerprint: the model's; without it, or without one in the schedule, values are not compared.
            allow_other_model: do not compare fingerprints.

        Raises:
            ScheduleError: with every unknown or missing Linear, wrong shape and difference of fingerprint.
        """
        unknown = [name for name in self.linears if name not in shapes]
        left_out = set(self.linears).union(self.metadata.excluded)
        problems = unknown_problems(unknown, shapes, "is no Linear of the model that can be scheduled")
        problems += [f"the schedule has no entry for {name}" for name in shapes if name not in left_out]
        for name, expected in self.shapes.items():
            if name in shapes and tuple(shapes[name]) != expected:
                problems.append(f"{name} is {list(shapes[name])} in the model, expected {list(expected)}")
        remedy = "Use the schedule with the model that it was made for, or make one for this model."
        if fingerprint and self.metadata.fingerprint and not allow_other_model:
            other = differences(self.metadata.fingerprint, fingerprint)
            problems += [f"another model: {difference}" for difference in other]
            remedy += " `allow_other_model=True` skips the comparison of fingerprints." if other else ""
        if problems:
            raise ScheduleError("the schedule does not fit the model", problems, remedy)

    def save(self, path: str | Path) -> None:
        """Write the schedule as a safetensors file, atomically. The same schedule gives the same bytes.

        Raises:
            OSError: if it cannot be written; an older file at `path` is then untouched.
        """
        strings = self.metadata.to_strings() | {
            "shapes": to_json(self.shapes, "shapes", sort_keys=False),
            "norm": to_json(self.norm, "norm"),
            "nominal_sparsity": to_json(self.sparsity, "nominal_sparsity"),
        }
        storage.write(path, storage.SCHEDULE, pack_linears(self.linears), strings)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a schedule and check everything in it.

        Raises:
            FileNotFoundError: if there is no such file.
            ScheduleError: if it is no schedule, from a newer version, or with every problem of its content.
        """
        tensors, strings = storage.read(path, storage.SCHEDULE)
        reader = MetadataReader(strings)
        shapes, norm = reader.shapes("shapes"), reader.value("norm", int, 1)
        nominal = float(reader.value("nominal_sparsity", (int, float), 0.0))
        metadata = ScheduleMetadata.read(reader)
        reader.finish()
        linears, problems = unpack_linears(tensors, shapes)
        problems = reader.problems + problems
        readable = {name: shape for name, shape in shapes.items() if name in linears}
        if linears or not problems:
            problems += schedule_problems(linears, readable)
        problems += _setting_problems(norm, metadata)
        if not problems:
            schedule = cls(linears, shapes, norm, metadata)
            if abs(schedule.sparsity - nominal) <= 1e-6:
                return schedule
            problems = [f"the nominal sparsity is recorded as {nominal}, the entries give {schedule.sparsity}"]
        raise ScheduleError(
            f"{path} is not a valid schedule", problems, "Correct the file, or make the schedule again."
        )


def _setting_problems(norm: int, metadata: ScheduleMetadata) -> list[str]:
    problems = [] if norm in (1, 2) else [f"the norm is p = {norm}, expected 1 or 2"]
    if metadata.target is not None and not 0 <= metadata.target < 1:
        problems.append(f"the target is {metadata.target}, expected at least 0 and below 1")
    if metadata.calibration_tokens < 0:
        problems.append(f"the calibration has {metadata.calibration_tokens} tokens, expected at least 0")
    return problems

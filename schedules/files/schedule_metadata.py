"""Where a schedule comes from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from was_fx.schedules.files.metadata import MetadataReader, plain, to_json
from was_fx.version import __version__


@dataclass(frozen=True)
class ScheduleMetadata:
    """How a schedule was made; nothing here changes what it does.

    Attributes:
        recipe: name of the recipe: `uniform`, `teal`, `wina`, `was`, `wisparse`, …
        target: the model sparsity asked for, or None.
        seed: the search's seed, or None without a search.
        search: the search's settings; JSON values.
        history: a summary of the search's trials; JSON values.
        source: of a schedule made from what others released: who, where, under which licence, and the level by
            their own count; JSON values.
        excluded: qualified names of the Linears left dense on purpose.
        calibration_text: what text the thresholds come from.
        calibration_tokens: how many tokens of it.
        fingerprint: the model's, see `was_fx.schedules.files.fingerprint`; empty if unknown.
        weights: the formats of the quantised Linears of the model that the thresholds were measured on, by qualified
            name; empty if it had none, None if that is not known.
        experts_per_token: how many experts a token was sent to, by group of experts (`was_fx.schedules.experts`).
        tool_version: the version of was-fx that made the schedule.

    Raises:
        ScheduleError: if a structured field holds what JSON cannot.
    """

    recipe: str = "custom"
    target: float | None = None
    seed: int | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    calibration_text: str = ""
    calibration_tokens: int = 0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] | None = None
    experts_per_token: Mapping[str, float] = field(default_factory=dict)
    tool_version: str = __version__

    def __post_init__(self) -> None:
        for name in ("search", "history", "source", "fingerprint", "experts_per_token"):
            object.__setattr__(self, name, plain(dict(getattr(self, name)), name))
        if self.weights is not None:
            object.__setattr__(self, "weights", plain(dict(self.weights), "weights"))
        object.__setattr__(self, "excluded", tuple(self.excluded))
        if self.target is not None:
            object.__setattr__(self, "target", float(self.target))

    def to_strings(self) -> dict[str, str]:
        """One string per field: text as it is, everything else as JSON; none for what is not known or not there."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if self.weights is None:
            del values["weights"]
        if not self.experts_per_token:
            del values["experts_per_token"]
        return {key: value if isinstance(value, str) else to_json(value, key) for key, value in values.items()}

    @classmethod
    def read(cls, reader: MetadataReader) -> "ScheduleMetadata":
        """The inverse of `to_strings`; what is wrong is noted in the reader and left at its default."""
        optional_number = (int, float, type(None))
        return cls(
            recipe=reader.text("recipe"),
            target=reader.value("target", optional_number, None),
            seed=reader.value("seed", (int, type(None)), None),
            search=reader.value("search", dict, {}),
            history=reader.value("history", dict, {}),
            source=reader.optional("source", dict, {}),
            excluded=reader.names("excluded"),
            calibration_text=reader.text("calibration_text"),
            calibration_tokens=reader.value("calibration_tokens", int, 0),
            fingerprint=reader.value("fingerprint", dict, {}),
            weights=reader.formats("weights"),
            experts_per_token=reader.numbers("experts_per_token"),
            tool_version=reader.text("tool_version"),
        )

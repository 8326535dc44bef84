"""Calibration: the threshold of each Linear at each sparsity, measured on a text."""

import dataclasses
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import FEW_TOKENS, group_of, groups, is_member
from was_fx.schedules.files import storage
from was_fx.schedules.files.calibration_file import calibration_problems, pack, unpack, unpack_settings
from was_fx.schedules.files.fisher_scores import FisherScores, fisher_problems
from was_fx.schedules.files.metadata import MetadataReader, plain, to_json
from was_fx.schedules.files.schedule_metadata import ScheduleMetadata
from was_fx.schedules.histogram import ScoreHistogram
from was_fx.schedules.names import suggestion
from was_fx.schedules.score import Score, channel_scale

_LEVELS = 1000
# Elements of x that are scored at a time: 16 MiB in fp32.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class Calibration:
    """Quantiles of the scores of each Linear's input channels.

    Attributes:
        score: the score that was measured.
        levels: sparsities, [L] fp32 on the CPU, increasing from 0; 0, 0.001, …, 0.999 when measured here.
        thresholds: by qualified name, τ at each level: [L] fp32 in score units, nondecreasing.
        shapes: (N, K) by qualified name, for the same names.
        tokens: number of tokens measured.
        text: description of the calibration text.
        fingerprint: the model's, see `was_fx.schedules.files.fingerprint`; empty if unknown.
        excluded: qualified names of the Linears that were left out on purpose.
        weights: the formats of the quantised Linears of the model, by qualified name; empty if it had none, None if
            that is not known.
        fisher: Fisher weights, and quantiles of the scores made with them; None if they were not measured.
        experts_per_token: how many experts a token was sent to, by group of experts (`was_fx.schedules.experts`).
        pooled: qualified names of experts' matrices that saw too few tokens, and have the thresholds of all experts of
            their group together.

    Raises:
        ScheduleError: with everything in these that does not fit.
    """

    score: Score
    levels: Tensor
    thresholds: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    tokens: int
    text: str
    fingerprint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    weights: Mapping[str, str] | None = None
    fisher: FisherScores | None = None
    experts_per_token: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pooled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", dict(self.thresholds))
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})
        object.__setattr__(self, "fingerprint", plain(dict(self.fingerprint), "fingerprint"))
        object.__setattr__(self, "excluded", tuple(self.excluded))
        object.__setattr__(self, "pooled", tuple(self.pooled))
        per_token = plain(dict(self.experts_per_token), "experts_per_token")
        object.__setattr__(self, "experts_per_token", per_token)
        if self.weights is not None:
            object.__setattr__(self, "weights", plain(dict(self.weights), "weights"))
        problems = calibration_problems(self.levels, self.thresholds, self.shapes, self.tokens)
        if self.fisher is not None and not problems:
            problems = fisher_problems(self.fisher, self.levels, self.shapes)
        if problems:
            raise ScheduleError("the calibration is not valid", problems, "Calibrate again.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Calibration):
            return NotImplemented
        plain_fields = (
            "score",
            "shapes",
            "tokens",
            "text",
            "fingerprint",
            "excluded",
            "weights",
            "fisher",
            "experts_per_token",
            "pooled",
        )
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain_fields)
            and torch.equal(self.levels, other.levels)
            and all(torch.equal(values, other.thresholds[name]) for name, values in self.thresholds.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def threshold(self, name: str, sparsity: float) -> float:
        """τ that drops a share `sparsity` of the Linear's channels, linear between levels.

        Raises:
            ValueError: for an unknown Linear, or a sparsity below 0 or above the last level.
        """
        last = float(self.levels[-1])
        if not 0 <= sparsity <= last:
            raise ValueError(f"{name}: sparsity must be from 0 to {last:.6g}, found {sparsity!r}")
        if name not in self.thresholds:
            raise ValueError(f"{name} was not calibrated{suggestion(name, self.thresholds)}")
        return float(np.interp(sparsity, self.levels.numpy(), self.thresholds[name].numpy()))

    def metadata(self, recipe: str, target: float, scheduled: Container[str], **more: Any) -> ScheduleMetadata:
        """What a schedule made from this calibration says of itself.

        Args:
            recipe: its name.
            target: the model sparsity that was asked for.
            scheduled: qualified names of the Linears that it schedules; all other calibrated ones are excluded.
            more: further fields of `ScheduleMetadata`, or others for these.
        """
        left_out = (name for name in self.shapes if name not in scheduled)
        fields: dict[str, Any] = {
            "recipe": recipe,
            "target": target,
            "excluded": (*self.excluded, *left_out),
            "calibration_text": self.text,
            "calibration_tokens": self.tokens,
            "fingerprint": self.fingerprint,
            "weights": self.weights,
            "experts_per_token": self.experts_per_token,
        }
        return ScheduleMetadata(**(fields | more))

    def save(self, path: str | Path) -> None:
        """Write the calibration as a safetensors file, atomically. Equal ones give the same bytes.

        Raises:
            OSError: if it cannot be written; an older file at `path` is then untouched.
        """
        values = {name: getattr(self, name) for name in ("tokens", "fingerprint", "excluded")}
        if self.weights is not None:
            values["weights"] = self.weights
        values |= {name: getattr(self, name) for name in ("experts_per_token", "pooled") if getattr(self, name)}
        strings = {key: to_json(value, key) for key, value in (values | vars(self.score)).items()}
        strings |= {"shapes": to_json(self.shapes, "shapes", sort_keys=False), "text": self.text}
        storage.write(path, storage.CALIBRATION, pack(self.levels, self.thresholds, self.fisher), strings)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration and check everything in it.

        Raises:
            FileNotFoundError: if there is no such file.
            ScheduleError: if it is no calibration, from a newer version, or with all problems of its content.
        """
        tensors, strings = storage.read(path, storage.CALIBRATION)
        reader = MetadataReader(strings)
        score, shapes, tokens, text, fingerprint, excluded = unpack_settings(reader)
        weights, per_token = reader.formats("weights"), reader.numbers("experts_per_token")
        pooled = tuple(reader.optional("pooled", list, []))
        reader.finish()
        levels, thresholds, fisher, unknown = unpack(tensors, shapes)
        problems = reader.problems + unknown + calibration_problems(levels, thresholds, shapes, tokens)
        if fisher is not None and not problems:
            problems = fisher_problems(fisher, levels, shapes)
        if problems:
            raise ScheduleError(f"{path} is not a valid calibration", problems, "Calibrate again.")
        return cls(
            score, levels, thresholds, shapes, tokens, text, fingerprint, excluded, weights, fisher, per_token, pooled
        )


class CalibrationBuilder:
    """Collects the scores of each Linear's input, in 256 KiB per Linear on the device of its input.

    Args:
        score: the score to measure.
        shapes: (N, K) of each Linear, by qualified name.
        norms: its channel norms g for `score.norm`, [K], by the same names.
    """

    def __init__(self, score: Score, shapes: Mapping[str, tuple[int, int]], norms: Mapping[str, Tensor]) -> None:
        self._score = score
        self._shapes = dict(shapes)
        self._scales = {name: channel_scale(norms[name].detach(), score.exponent) for name in shapes}
        self._histograms: dict[str, ScoreHistogram] = {}

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        """Count the scores of one input of Linear `name`: x [..., K], any floating dtype."""
        channels = self._shapes[name][1]
        if name not in self._histograms:
            self._histograms[name] = ScoreHistogram(x.device)
            self._scales[name] = self._scales[name].to(x.device)
        for block in x.reshape(-1, channels).split(max(1, _BLOCK_ELEMENTS // channels)):
            scores = block if self._score.exponent == 0 else block.float() * self._scales[name]
            self._histograms[name].add(scores)

    def unseen(self) -> list[str]:
        """The Linears without input, but for experts of which others of their group have some."""
        pooled = self._pool()
        return [name for name in self._shapes if not self._total(name) and name not in pooled]

    def leave_out(self, names: Collection[str]) -> None:
        """Forget these Linears."""
        self._shapes = {name: shape for name, shape in self._shapes.items() if name not in names}
        self._histograms = {name: each for name, each in self._histograms.items() if name not in names}

    def build(
        self,
        text: str,
        fingerprint: Mapping[str, Any],
        excluded: Collection[str] = (),
        weights: Mapping[str, str] | None = None,
        tokens: int | None = None,
    ) -> Calibration:
        """The calibration of what was added.

        An expert that has seen fewer than 32 tokens gets the thresholds of all experts of its group together.

        Args:
            text: description of the calibration text.
            fingerprint: the model's.
            excluded: qualified names of the Linears that were left out on purpose.
            weights: the formats of the model's quantised Linears, by qualified name.
            tokens: how many tokens the model has seen; by default the largest number that one Linear has.

        Raises:
            ScheduleError: naming every Linear without input, or with NaN or infinite scores.
        """
        pooled = self._pool()
        problems = [f"{name} has seen no token" for name in self.unseen()]
        problems += [
            f"{name}: {histogram.nonfinite} of {histogram.total} scores are NaN or infinite"
            for name, histogram in self._histograms.items()
            if histogram.nonfinite
        ]
        if problems:
            remedy = (
                "Calibrate on more text, in a dtype in which the model gives finite activations, "
                "or leave these Linears out with `exclude`."
            )
            raise ScheduleError("the calibration is not usable", problems, remedy)
        levels = torch.arange(_LEVELS, dtype=torch.float64) / _LEVELS
        whole = {group: histogram.quantiles(levels) for group, histogram in self._of_groups(pooled).items()}
        thresholds = {
            name: whole[group_of(name)] if name in pooled else self._histograms[name].quantiles(levels)
            for name in self._shapes
        }
        seen = {name: self._total(name) // channels for name, (_, channels) in self._shapes.items()}
        tokens = max(seen.values()) if tokens is None else tokens
        return Calibration(
            score=self._score,
            levels=levels.float(),
            thresholds=thresholds,
            shapes=self._shapes,
            tokens=tokens,
            text=text,
            fingerprint=fingerprint,
            excluded=tuple(excluded),
            weights=weights,
            experts_per_token={
                group: sum(seen[name] for name in names) / tokens
                for group, names in groups(self._shapes).items()
                if is_member(names[0])
            },
            pooled=tuple(pooled),
        )

    def _pool(self) -> list[str]:
        """The experts' matrices that have seen too few tokens, where others of their group have seen some."""
        found = []
        for names in groups(self._shapes).values():
            if is_member(names[0]) and any(self._total(name) for name in names):
                found += [name for name in names if self._total(name) < FEW_TOKENS * self._shapes[name][1]]
        return found

    def _of_groups(self, names: Collection[str]) -> dict[str, ScoreHistogram]:
        """All scores of the groups that these names are of."""
        wanted, found = groups(names), groups(self._histograms)
        return {group: ScoreHistogram.sum(self._histograms[name] for name in found[group]) for group in wanted}

    def _total(self, name: str) -> int:
        return self._histograms[name].total if name in self._histograms else 0

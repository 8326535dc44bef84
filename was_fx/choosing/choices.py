"""`measure_choices`: loss, bytes and speed of a model in several formats of weights, dense and with schedules."""

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from was_fx.choosing.results_log import ResultsLog
from was_fx.compile.options import ModelLowering
from was_fx.measure.evaluate import evaluate
from was_fx.measure.speed import SpeedRow, decode_speed
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.modules.token_rule import Prefill
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.files.schedule_file import pack_linears
from was_fx.schedules.progress import Progress
from was_fx.sparse.quantize import quantize
from was_fx.sparse.sparsify import densify, sparsify
from was_fx.sparse.weight_plan import Weights


@dataclass(frozen=True)
class Choice:
    """One way to run the model.

    Attributes:
        format: of the weights, as the caller named it.
        schedule: as the caller named it; None without one.
        loss: mean negative log-likelihood, nats per token.
        perplexity: exp(loss).
        nominal: model sparsity by the schedule, 0.0 without one.
        realised: model sparsity on the text.
        linears: realised sparsity of each scheduled Linear.
        bytes_per_token: weight bytes that a token reads, the head's included.
        texts: how it goes on from each prompt.
        ms_per_token: median time of a new token, None where no speed was measured: of a decode step on a GPU, else of
            `generate()`.
        dense_ms: the same of the model as it was loaded, dense, timed in turns with this.
        repetitions: the times that `ms_per_token` is the median of.
    """

    format: str
    schedule: str | None
    loss: float
    perplexity: float
    nominal: float
    realised: float
    linears: Mapping[str, float]
    bytes_per_token: int
    texts: tuple[str, ...]
    ms_per_token: float | None = None
    dense_ms: float | None = None
    repetitions: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the model as it was loaded, dense."""
        return None if self.ms_per_token is None or self.dense_ms is None else self.dense_ms / self.ms_per_token


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: a dense model, LongTensor [n, seq] of a text, and what continues prompts by the model as it is
    when it is called."""

    model: nn.Module
    tokens: Tensor
    write: Callable[[nn.Module], list[str]]


@dataclass(frozen=True)
class Method:
    """How it is measured.

    Attributes:
        prefill: which tokens of the text are sparse, as for `evaluate`.
        batch_size: sequences per forward pass.
        speed: time it too.
        repetitions: how often each is timed.
        lowering: of decode steps, as for `sparsify`.
        allow_other_model: as for `sparsify`.
    """

    prefill: Prefill = "sparse"
    batch_size: int = 4
    speed: bool = True
    repetitions: int = 5
    lowering: ModelLowering | None = None
    allow_other_model: bool = False


# Told what is being measured; gives the function to report progress to.
Watch = Callable[[str], AbstractContextManager[Progress]]


def measure_choices(
    load: Callable[[], Subject],
    schedules: Mapping[str, Schedule],
    formats: Mapping[str, Weights | None],
    *,
    method: Method,
    log: ResultsLog,
    setting: Mapping[str, Any],
    watch: Watch,
) -> list[Choice]:
    """Measure every format of weights, dense and with every schedule; what is in the log is taken from there.

    Losses come from one pass over the text each. Speed is measured for one format at a time, dense and all schedules
    in turns in one process, with prompts from the text.

    Args:
        load: gives the subject; called once, and only if something is to be measured.
        schedules: by name.
        formats: what to quantise a copy of the model in, by name; None for the model as it is.
        method: how.
        log: where results are kept.
        setting: JSON values that tell this model, text and machine from others.
        watch: called for each measurement.
    """
    bench = _Bench(load, schedules, method, log, setting, watch)
    return [choice for name, weights in formats.items() for choice in bench.choices(name, weights)]


class _Bench:
    """The model in one format at a time, loaded and quantised when it is needed."""

    def __init__(
        self,
        load: Callable[[], Subject],
        schedules: Mapping[str, Schedule],
        method: Method,
        log: ResultsLog,
        setting: Mapping[str, Any],
        watch: Watch,
    ) -> None:
        self._load, self._method, self._log, self._watch = load, method, log, watch
        self._schedules: dict[str | None, Schedule | None] = {None: None}
        self._schedules.update(schedules)
        self._digests = {name: each and digest(each) for name, each in self._schedules.items()}
        self._setting = {**setting, **dataclasses.asdict(method)}
        for name in ("speed", "repetitions", "batch_size"):
            del self._setting[name]
        self._subject: Subject | None = None
        self._quantised: tuple[str, nn.Module] | None = None

    def choices(self, format: str, weights: Weights | None) -> list[Choice]:
        """One without a schedule, then one for each."""
        with warnings.catch_warnings():
            if weights is not None:  # it is asked for; callers say so where they show it
                warnings.filterwarnings("ignore", message="the schedule was made with weights")
            quality = [self._quality(format, weights, name) for name in self._schedules]
            self._quantised = None  # timing makes a copy of its own
            speed = self._speed(format, weights) if self._method.speed else [{} for _ in quality]
        return [
            Choice(format, name, **_tuples(found | times))
            for name, found, times in zip(self._schedules, quality, speed, strict=True)
        ]

    def _quality(self, format: str, weights: Weights | None, name: str | None) -> dict[str, Any]:
        what = {**self._setting, "measured": "quality", "weights": weights, "schedule": self._digests[name]}
        return self._log.get(what) or self._log.add(what, self._measure_quality(format, weights, name))

    def _measure_quality(self, format: str, weights: Weights | None, name: str | None) -> dict[str, Any]:
        model, schedule, method = self._model(format, weights), self._schedules[name], self._method
        if schedule is not None:
            sparsify(model, schedule, lowering=method.lowering, allow_other_model=method.allow_other_model)
        try:
            with self._watch(f"Scoring {format}, {name or 'dense'}") as progress:
                found = evaluate(
                    model,
                    self.subject.tokens,
                    prefill=method.prefill,
                    batch_size=method.batch_size,
                    progress=progress,
                )
            with self._watch(f"Writing with {format}, {name or 'dense'}"):
                texts = self.subject.write(model)
            everything = weight_bytes_per_token(model)
        finally:
            densify(model)
        return {
            "loss": found.loss,
            "perplexity": found.perplexity,
            "nominal": found.nominal,
            "realised": found.realised,
            "linears": found.linears,
            "bytes_per_token": round(everything * (1 - found.bytes_saved)),
            "texts": texts,
        }

    def _speed(self, format: str, weights: Weights | None) -> list[dict[str, Any]]:
        what = {
            **self._setting,
            "measured": "speed",
            "weights": weights,
            "schedules": list(self._digests.values()),
            "repetitions": self._method.repetitions,
        }
        found = self._log.get(what) or self._log.add(what, {"rows": self._measure_speed(format, weights)})
        rows: list[dict[str, Any]] = found["rows"]
        return rows

    def _measure_speed(self, format: str, weights: Weights | None) -> list[dict[str, Any]]:
        """Of a quantised format the first is the one that drops nothing; the model as it was loaded runs beside it."""
        targets: list[float | Schedule] = [each for each in self._schedules.values() if each is not None]
        with self._watch(f"Timing {format}, dense and sparse in turns") as progress:
            rows = decode_speed(
                self.subject.model,
                targets if weights is None else [0.0, *targets],
                text=self.subject.tokens,
                repetitions=self._method.repetitions,
                weights=weights,
                lowering=self._method.lowering,
                allow_other_model=self._method.allow_other_model,
                progress=progress,
            )
        return [_times(row, rows[0]) for row in (rows if weights is None else rows[1:])]

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = self._load()
        return self._subject

    def _model(self, format: str, weights: Weights | None) -> nn.Module:
        if weights is None:
            return self.subject.model
        if self._quantised is None or self._quantised[0] != format:
            with self._watch(f"Quantising to {format}") as progress:
                self._quantised = format, quantize(copy.deepcopy(self.subject.model), weights, progress=progress)
        return self._quantised[1]


def digest(schedule: Schedule) -> str:
    """A short hash of what a schedule holds, whatever its file is called."""
    found = hashlib.sha256(json.dumps([schedule.metadata.to_strings(), schedule.norm], sort_keys=True).encode())
    for name, tensor in sorted(pack_linears(schedule.linears).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def _times(row: SpeedRow, dense: SpeedRow) -> dict[str, Any]:
    return {"ms_per_token": row.ms, "dense_ms": dense.ms, "repetitions": row.repetitions}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists that JSON gave back as the tuples they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}

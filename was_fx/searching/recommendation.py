"""`recommend`: the most sparsity, and with it the format of weights, whose loss stays within a budget."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.measure.calibrate import calibrate
from was_fx.measure.evaluate import evaluate
from was_fx.measure.speed import decode_speed
from was_fx.modules.linears import find_linears, weight_bytes_per_token
from was_fx.modules.placement import input_device
from was_fx.modules.quantized_linear import weight_formats
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.search.block_search import SearchProgress, SearchState
from was_fx.schedules.search.fisher_correction import FisherSettings
from was_fx.schedules.search.highest import highest_within
from was_fx.schedules.search.recipes import find_recipe
from was_fx.schedules.search.trial_log import TrialLog
from was_fx.searching.schedule_search import correct_fisher, search, tokens_digest
from was_fx.sparse.quantize import quantize
from was_fx.sparse.sparsify import densify, sparsify
from was_fx.sparse.state import model_fingerprint, sparse_state
from was_fx.sparse.weight_plan import parse_format
from was_fx.version import __version__

# Sparsities that are measured whatever the budget is: what the curve has besides the answer.
CURVE = (0.25, 0.4, 0.5)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# Of every so many sequences one is not for calibration, but for judging.
_JUDGED = 3
# The weights of the calibration have been corrected.
_RECIPE = replace(find_recipe("fisher"), fisher=FisherSettings(corrections=0))


@dataclass(frozen=True)
class Point:
    """A format of weights at one sparsity.

    Attributes:
        weights: "int8", "int4-32", …, or "bf16", "fp16", "fp32" for weights as they were.
        target: model sparsity that was asked for; 0.0 without a schedule.
        realised: measured on the held-out text.
        loss: nats per token of the held-out text.
        added: the same above the dense model with its own weights.
        error: standard error of `added`, over the sequences of the text.
        bytes_per_token: of all weights that a token reads, the head's included.
        ms_per_token: median time of a new token, None where it was not measured.
    """

    weights: str
    target: float
    realised: float
    loss: float
    added: float
    error: float
    bytes_per_token: int
    ms_per_token: float | None = None

    @property
    def cost(self) -> float:
        """What it takes: time, or bytes where that was not measured."""
        return self.bytes_per_token if self.ms_per_token is None else self.ms_per_token


@dataclass(frozen=True)
class Recommendation:
    """The answer, and what it was chosen from.

    Attributes:
        budget: what the loss may add, nats per token.
        best: the recommended point.
        schedule: of it, for a model with weights in its format; None if the best is a format without sparsity.
        choices: of each format that is within the budget, the highest sparsity.
        points: all that was measured, by format and sparsity.
        quantised: whether the best has other weights than the model's own.
    """

    budget: float
    best: Point
    schedule: Schedule | None
    choices: tuple[Point, ...]
    points: tuple[Point, ...]
    quantised: bool


def recommend(
    model: nn.Module,
    tokens: Tensor,
    *,
    validation: Tensor | None = None,
    loss: float = math.log(1.01),
    weights: str | Sequence[str] | None = None,
    curve: Sequence[float] = CURVE,
    precision: float = 0.01,
    speed: bool = True,
    seed: int = 0,
    batch_size: int = 1,
    text: str = "",
    log: str | Path | None = None,
    resume: bool = False,
    progress: SearchProgress | None = None,
) -> Recommendation:
    """Find the highest sparsity whose loss on held-out text is within a budget, by the recipe `fisher`.

    The model is calibrated once, as it is, and its Fisher weights are corrected once, where it drops half. For each
    format of weights, a few sparsities between 0 and 0.9 are made from that calibration, with thresholds measured while
    the model in that format drops channels, and judged. Of several formats the one whose tokens take least time is
    recommended, or least bytes where time is not measured.

    Args:
        model: a dense causal LM; not changed. For each other format a copy is quantised.
        tokens: LongTensor [n, seq], a text like those that the model will see.
        validation: LongTensor [n, seq] to judge on; by default every third sequence of `tokens`, which calibration then
            does not see.
        loss: what sparsity and format together may add, nats per token; log(1.01) is 1 % of perplexity.
        weights: formats to try: "int8", "int4", …, and "none", or "bf16" if it is that, for the model's own; by default
            that alone. int4 is fitted to the tokens that calibrate (GPTQ).
        curve: sparsities to measure in any case.
        precision: how close to the answer the budget must be exceeded.
        speed: time decoding too, of each format at 0, on the curve and at its answer.
        seed: of the labels drawn for Fisher weights.
        batch_size: sequences per forward pass of the calibration.
        text: what the tokens are, for the record.
        log: file for a JSON line per measurement.
        resume: take from the log what was measured before, with whatever budget and formats.
        progress: called with a `SearchState` at every step.

    Raises:
        ValueError: the model is sparsified, a format is not known or not possible, or an argument is out of range.
        ScheduleError: nothing is within the budget; the model can't be calibrated; the log is of another model or text.
        FileExistsError: there is a log and `resume` is not set.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; give the dense one: was_fx.densify(model) first")
    if not 0 < loss < math.inf:
        raise ValueError(f"loss is {loss!r}; expected nats per token above 0, such as 0.01 for about 1 % of perplexity")
    if not curve or not all(0 < each < 1 for each in curve):
        raise ValueError(f"curve is {list(curve)!r}; expected sparsities above 0 and below 1")
    formats = _formats(model, weights)
    samples, judged = (tokens, validation) if validation is not None else _split(tokens)
    for each in (samples, judged):
        check_tokens(model, each)
    settings = {
        "recommend": 1,
        "model": model_fingerprint(model, find_linears(model)),
        "weights": _own(model),
        "tokens": [*samples.shape, tokens_digest(samples)],
        "validation": [*judged.shape, tokens_digest(judged)],
        "seed": seed,
        "was_fx": __version__,
    }
    trials = TrialLog(log, settings, resume=resume)

    def tell(phase: str, done: int = 0, total: int = 0) -> None:
        if progress is not None:
            progress(SearchState(done, total, phase=phase))

    calibration = calibrate(
        model,
        samples,
        text=text,
        fisher=True,
        seed=seed,
        batch_size=batch_size,
        progress=lambda done, total: tell("calibrating", min(done, total - 1), total),
    )
    calibration = correct_fisher(
        model, calibration, tokens=samples, seed=seed, batch_size=batch_size, progress=progress
    )
    dense = _Bench(model, _own(model), calibration, samples, judged, seed, batch_size, trials, tell)
    before = dense.losses(0.0)
    found: list[_Answers] = []
    for format in formats:
        bench = dense if format == dense.format else dense.quantised(format)
        found.append(bench.answers(before, loss, curve, precision, speed))
    return _recommendation(found, loss, dense.format)


class _Bench:
    """A model in one format: its loss and its time by sparsity."""

    def __init__(
        self,
        model: nn.Module,
        format: str,
        calibration: Calibration,
        samples: Tensor,
        judged: Tensor,
        seed: int,
        batch_size: int,
        log: TrialLog,
        tell: Callable[..., None],
    ) -> None:
        self.format = format
        self._model, self._calibration, self._samples, self._judged = model, calibration, samples, judged
        self._seed, self._batch_size, self._log, self._tell = seed, batch_size, log, tell
        self._schedules: dict[float, Schedule] = {}

    def quantised(self, format: str) -> "_Bench":
        """The same of a copy in another format."""
        self._tell(f"{format}: quantising")
        model = quantize(
            copy.deepcopy(self._model),
            format,
            tokens=None if format == "int8" else self._samples,
            progress=lambda done, total: self._tell(f"{format}: quantising", min(done, total - 1), total),
        )
        # Thresholds are measured on this model before they are used; the Fisher weights are those of the other.
        calibration = replace(self._calibration, weights=weight_formats(model))
        shared = (self._samples, self._judged, self._seed, self._batch_size, self._log, self._tell)
        return _Bench(model, format, calibration, *shared)

    def answers(
        self, before: Sequence[float], budget: float, curve: Sequence[float], precision: float, speed: bool
    ) -> "_Answers":
        """What was measured, and the highest sparsity within the budget."""
        points: dict[float, Point] = {}

        def cost(target: float) -> float:
            points[target] = self.point(target, before)
            return points[target].added

        best = highest_within(cost, budget, grid=curve, precision=precision)
        if speed and best is not None:
            chosen = sorted({0.0, *(each for each in points if each in {round(c, 3) for c in curve}), best})
            for target, ms in self.speeds(chosen).items():
                points[target] = replace(points[target], ms_per_token=ms)
        every = tuple(points[target] for target in sorted(points))
        return _Answers(every, best, self.schedule(best) if best else None)

    def schedule(self, target: float) -> Schedule:
        """By the recipe, with thresholds measured on this model."""
        if target not in self._schedules:
            self._schedules[target] = search(
                self._model,
                self._calibration,
                tokens=self._samples,
                target=target,
                recipe=_RECIPE,
                seed=self._seed,
                batch_size=self._batch_size,
                text=self._calibration.text,
            )
        return self._schedules[target]

    def losses(self, target: float) -> list[float]:
        """Of each sequence of the held-out text."""
        return self._measured(target)["losses"]

    def point(self, target: float, before: Sequence[float]) -> Point:
        """The loss at a sparsity, against the losses of the dense model with its own weights."""
        found = self._measured(target)
        differences = [each - dense for each, dense in zip(found["losses"], before, strict=True)]
        return Point(
            weights=self.format,
            target=target,
            realised=found["realised"],
            loss=statistics.fmean(found["losses"]),
            added=statistics.fmean(differences),
            error=statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan,
            bytes_per_token=found["bytes"],
        )

    def speeds(self, targets: Sequence[float]) -> dict[float, float]:
        """Milliseconds of a new token, all in turns."""
        device = input_device(self._model)
        where = f"{device} with {torch.get_num_threads()} threads"
        key = f"{self.format} on {where} at {', '.join(f'{each:g}' for each in targets)}"
        record = self._log.recorded(key, None)
        if record is None:
            own = not weight_formats(self._model)
            rows = decode_speed(
                self._model,
                [*([] if own else [0.0]), *(self.schedule(each) for each in targets if each)],
                text=self._judged,
                with_dense=own,
                lowering=None if device.type == "cuda" else "eager",
                progress=lambda done, total: self._tell(f"{self.format}: timing", min(done, total - 1), total),
            )
            record = self._log.add(key, None, {"ms": [row.ms_per_token for row in rows]})
        return dict(zip(targets, record["ms"], strict=True))

    def _measured(self, target: float) -> dict[str, Any]:
        """Losses by sequence, the realised sparsity and bytes per token; from the log if they are there."""
        key = f"{self.format} {target:g}"
        record = self._log.recorded(key, target)
        if record is not None:
            return record
        phase = f"{self.format} at {100 * target:g} %"
        if target:
            self._tell(f"{phase}: thresholds")
            sparsify(self._model, self.schedule(target))
        try:
            found = []
            for done, sequence in enumerate(self._judged):
                self._tell(f"{phase}: loss", done, len(self._judged))
                found.append(evaluate(self._model, sequence[None]))
            read = weight_bytes_per_token(self._model)
        finally:
            densify(self._model)
        saved = statistics.fmean(each.bytes_saved for each in found)
        losses = [each.loss for each in found]
        if not all(map(math.isfinite, losses)):
            raise ScheduleError(
                f"the loss of {phase} is NaN or infinite", remedy="Load the model in bf16 or fp32, and check the text."
            )
        realised = statistics.fmean(each.realised for each in found)
        result = {"losses": losses, "realised": realised, "bytes": round(read * (1 - saved))}
        return self._log.add(key, target, result)


@dataclass(frozen=True)
class _Answers:
    """Of one format: its points by sparsity, the highest sparsity within the budget (None if none is) and the schedule
    (None without sparsity)."""

    points: tuple[Point, ...]
    best: float | None
    schedule: Schedule | None


def _recommendation(found: Sequence[_Answers], budget: float, own: str) -> Recommendation:
    points = tuple(point for each in found for point in each.points)
    choices = [
        (next(point for point in each.points if point.target == each.best), each.schedule)
        for each in found
        if each.best is not None
    ]
    if not choices:
        problems = [f"{point.weights} without any sparsity adds {_share(point.added)}" for point in points]
        raise ScheduleError(
            f"no format is within the budget of {_share(budget)}",
            problems,
            "Allow more, or add a format with more bits.",
        )
    best, schedule = min(choices, key=lambda each: each[0].cost)
    if best.target == best.added == 0:
        least = [next((p for p in each.points if each.best == 0 < p.target), each.points[0]) for each in found]
        problems = [f"{p.weights} at {100 * p.target:g} % adds {_share(p.added)}, ± {_share(p.error)}" for p in least]
        remedy = "Allow more, judge on more text, or try weights of int8, which cost less for the bytes that they save."
        raise ScheduleError(f"nothing but the dense model is within the budget of {_share(budget)}", problems, remedy)
    chosen = tuple(point for point, _ in choices)
    return Recommendation(budget, best, schedule, chosen, points, best.weights != own)


def _share(nats: float) -> str:
    """A difference of loss as one of perplexity."""
    return f"{100 * math.expm1(nats):.2g} % of perplexity"


def _own(model: nn.Module) -> str:
    """What the model's own weights are called."""
    formats = list(weight_formats(model).values())
    if formats:
        return max(set(formats), key=formats.count)
    parameter = next(each for each in model.parameters() if each.is_floating_point())
    return _DTYPES.get(parameter.dtype, str(parameter.dtype))


def _formats(model: nn.Module, weights: str | Sequence[str] | None) -> list[str]:
    """Formats to try, each once, in this order; the model's own by its name."""
    own, found = _own(model), []
    for each in ["none"] if weights is None else [weights] if isinstance(weights, str) else weights:
        if each in _DTYPES.values() and each != own:
            raise ValueError(
                f"the model's weights are {own}, not {each}: load it in that dtype, or give 'none' for them"
            )
        format = own if each == own or parse_format(each) in ("none", own) else parse_format(each)
        if format != own and weight_formats(model):
            raise ValueError(
                f"the model is {own} already and can't become {format}; give the checkpoint it was made of"
            )
        found.append(format)
    if not found:
        raise ValueError("weights names no format; expected at least one, such as 'int8'")
    return list(dict.fromkeys(found))


def _split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences to calibrate on, and every third to judge on."""
    if tokens.dim() == 2 and len(tokens) < _JUDGED:
        raise ValueError(
            f"the text has {len(tokens)} sequences; at least {_JUDGED} are needed, one of them to judge on; give more "
            "text or shorter sequences, or a validation text of its own"
        )
    judged = torch.arange(len(tokens)) % _JUDGED == _JUDGED - 1
    return tokens[~judged], tokens[judged]

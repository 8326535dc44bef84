"""`decode_speed`: time per token of a model, dense under torch.compile and sparse, in turns in one process."""

import contextlib
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.dynamo import compiled_call, set_compiled_call, settings_for_models
from was_fx.compile.options import ModelLowering
from was_fx.generate.compiled_step import CompiledStep
from was_fx.measure.sequential import realised_sparsity, uniform_while_dropping
from was_fx.measure.timed_model import WARM_UP, Load, TimedModel, Turn
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.modules.placement import input_device
from was_fx.modules.tokens import check_tokens, vocabulary
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.progress import Progress, report
from was_fx.schedules.score import Score
from was_fx.sparse.quantize import quantize
from was_fx.sparse.sparsify import densify, sparsify
from was_fx.sparse.state import sparse_state
from was_fx.sparse.weight_plan import Weights

# Runs of decode steps on a GPU whose tokens must be the same.
REPEATS = 20


@dataclass(frozen=True)
class SpeedRow:
    """Decode speed at one sparsity. What was not measured is None.

    Attributes:
        target: nominal model sparsity; 0.0 for the dense model.
        realised: model sparsity on the prompt and the tokens that were timed, all of them sparse.
        ms_per_token: wall time of a new token in `generate()`, median over the repetitions.
        repetitions: what `ratio` compares, of each repetition: `step_ms` where it was measured, else `ms_per_token`.
        ratio: the dense model's time over this one's, decode steps where they were timed, else `generate()`.
        bytes_per_token: bytes of weights read for one token, the head's included.
        step_ms: median time of a decode step by the GPU's clock.
        prompt_tokens: length of the prompt of `prompt_ms`.
        prompt_ms: forward of a prompt with an empty cache, the time to the first token.
        first_generate_s: wall time of the first `generate()`, everything compiled anew; of one sparsity only.
        recompiled: graphs compiled by `generate()` calls with other lengths.
        kernels: launched in one decode step.
        repeatable: whether all repeated runs gave the same tokens.
        peak_bytes: of GPU memory, the dense and the sparse model included.
    """

    target: float
    realised: float
    ms_per_token: float
    repetitions: tuple[float, ...]
    ratio: float | None
    bytes_per_token: int
    step_ms: float | None = None
    prompt_tokens: int | None = None
    prompt_ms: float | None = None
    first_generate_s: float | None = None
    recompiled: int | None = None
    kernels: int | None = None
    repeatable: bool | None = None
    peak_bytes: int | None = None

    @property
    def ms(self) -> float:
        """The time that `ratio` compares."""
        return self.ms_per_token if self.step_ms is None else self.step_ms


def random_model(config: Any, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> nn.Module:
    """A causal LM with random weights, made on the device, for a configuration such as `LlamaConfig(...)`."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def decode_speed(
    model_or_config: Any,
    targets: Sequence[float | Schedule],
    *,
    text: Tensor | None = None,
    prompt: int | None = None,
    tokens: int | None = None,
    long_prompt: int | None = None,
    repetitions: int = 5,
    cache: str | None = None,
    score: Score | None = None,
    with_dense: bool = True,
    dense_mode: str = "reduce-overhead",
    weights: Weights | None = None,
    head: float | None = None,
    seed: int = 0,
    lowering: ModelLowering | None = None,
    allow_other_model: bool = False,
    progress: Progress | None = None,
) -> list[SpeedRow]:
    """Time greedy decoding of one sequence, dense and at uniform sparsities or by schedules.

    The sparse model is a copy of the dense one that shares no storage, and runs as `sparsify` leaves it: on a CPU
    eager, on a GPU with compiled decode steps. The dense one is compiled as its users would: on a CPU the whole model
    (dynamic shapes), on a GPU its decode steps with CUDA graphs (fixed shapes), and
    `generate()` as transformers does for a static cache. They take turns in the same process, so a slow moment of the
    machine hits all of them. Compilation is not part of any time. Thresholds of a uniform sparsity are read off the
    model's own activations, while it drops channels: this is about speed, not quality.

    Args:
        model_or_config: a dense causal LM, or a configuration for one with random bf16 weights on the CPU.
        targets: model sparsities, each at least 0 and below 1; or schedules of the model, which then need a `text`
            to drop what they would.
        text: LongTensor [n, seq] to take prompts from, which are no longer than it; by default random tokens.
        prompt: tokens before those that are decoded; by default 128 on a GPU, 16 on a CPU.
        tokens: new tokens per repetition; at least 2, on a GPU and of recorded steps 25; by default 64 on a GPU,
            32 on a CPU.
        long_prompt: tokens of the prompt whose forward is timed alone; by default 2048 on a GPU, 128 on a CPU, and no
            more than the model has positions.
        repetitions: how often each is timed.
        cache: "static" or "dynamic", the KV cache; by default static on a GPU, dynamic on a CPU, where that of a model
            with recorded steps is static.
        score: of the thresholds; WAS's by default.
        with_dense: time the dense model too; without it, `ratio` is None.
        dense_mode: the mode of torch.compile for the dense model's decode steps on a GPU.
        weights: formats of the sparse model's weights, as for `quantize`; the dense one keeps its own.
        head: sparsity of the output head beside targets that are numbers; by default it stays dense.
        seed: of the random weights and tokens.
        lowering: of the sparse model, as for `sparsify`; "eager" compiles the dense one neither.
        allow_other_model: as for `sparsify`.
        progress: called with (runs done, all runs).

    Returns:
        The dense row, then one per target.

    Raises:
        ValueError: an argument is out of range, or the model is sparsified.
        ScheduleError: a schedule does not fit the model.
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else random_model(model_or_config, seed=seed)
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; the dense one is needed: was_fx.densify(model) first")
    on_gpu = input_device(model).type == "cuda"
    prompt, tokens = prompt or (128 if on_gpu else 16), tokens or (64 if on_gpu else 32)
    least = 3 * WARM_UP + 1 if on_gpu or lowering == "recorded" else 2
    if tokens < least or prompt < 1 or repetitions < 1:
        raise ValueError(
            f"tokens is {tokens}, prompt {prompt} and repetitions {repetitions}; expected at least {least}, 1 and 1"
        )
    ids, load = _load(model, text, prompt, tokens, long_prompt, cache, seed)
    sparse = copy.deepcopy(model)
    if weights is not None:
        quantize(sparse, weights)
    schedules = [
        each if isinstance(each, Schedule) else uniform_while_dropping(sparse, ids, each, score, head)
        for each in targets
    ]
    subjects: list[Schedule | None] = [*([None] if with_dense else []), *schedules]
    with _compiled_dense(model, load, lowering, dense_mode) as dense_step:
        sparse_step = sparse if lowering == "eager" else CompiledStep(sparse, {})
        sparse_load = load
        if lowering == "recorded":
            sparse_load = replace(load, warm_up=WARM_UP, cache=cache or "static")
        runs = _Runs(
            TimedModel(model, load, dense_step),
            TimedModel(sparse, sparse_load, sparse_step),
            subjects,
            repetitions,
            {"lowering": lowering, "allow_other_model": allow_other_model},
        )
        details = runs.warm_up(progress)
        turns = runs.turns(progress)
    return _rows(model, densify(sparse), load, subjects, details, turns)


def _load(
    model: nn.Module,
    text: Tensor | None,
    prompt: int,
    tokens: int,
    long_prompt: int | None,
    cache: str | None,
    seed: int,
) -> tuple[Tensor, Load]:
    """Tokens [n, seq] to take thresholds from, and what is timed."""
    device = input_device(model)
    on_gpu = device.type == "cuda"
    longest = getattr(model.config, "max_position_embeddings", None) or 2048  # type: ignore[union-attr]
    length = min(long_prompt or (2048 if on_gpu else 128), longest)
    width = max(prompt, length, 128)
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary(model) or 2, (4, width), generator=generator)
    else:
        check_tokens(model, text)
        width = min(width, text.numel())
        ids = text.flatten()[: text.numel() // width * width].view(-1, width)[:4]
    row = ids[:1].to(device)
    cache = cache or ("static" if on_gpu else "dynamic")
    load = Load(row[:, :prompt], row[:, :length], tokens, cache, WARM_UP if on_gpu else 0)
    return ids[:, : min(128, longest)], load


@contextlib.contextmanager
def _compiled_dense(model: Any, load: Load, lowering: ModelLowering | None, mode: str) -> Iterator[Any]:
    """Compile the dense model as its users would while the context lasts; gives what makes its decode steps."""
    if lowering == "eager":
        yield model
        return
    if load.prompt.is_cuda:
        yield torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
        return
    before = compiled_call(model)
    try:
        model.compile(dynamic=True, fullgraph=True)
        yield model
    finally:
        set_compiled_call(model, before)


class _Runs:
    """The dense model (None) and the sparse one at each schedule, taking turns."""

    def __init__(
        self,
        dense: TimedModel,
        sparse: TimedModel,
        subjects: Sequence[Schedule | None],
        repetitions: int,
        how: dict[str, Any],
    ) -> None:
        self._dense, self._sparse, self._how = dense, sparse, how
        self._subjects, self._repetitions = subjects, repetitions
        self._done = 0

    def warm_up(self, progress: Progress | None) -> list[dict[str, Any]]:
        """What is measured once of each, with everything compiled and captured on the way."""
        found: list[dict[str, Any]] = []
        for schedule in self._subjects:
            with self._ready(schedule) as timed:
                first = schedule is None or schedule is next(each for each in self._subjects if each is not None)
                found.append(_measured_once(timed, first=first, sparse=schedule is not None))
            self._note(progress)
        return found

    def turns(self, progress: Progress | None) -> list[list[Turn]]:
        """The turns of each."""
        found: list[list[Turn]] = [[] for _ in self._subjects]
        for _ in range(self._repetitions):
            for schedule, turns in zip(self._subjects, found, strict=True):
                with self._ready(schedule) as timed:
                    turns.append(timed.turn())
                self._note(progress)
        return found

    @contextlib.contextmanager
    def _ready(self, schedule: Schedule | None) -> Iterator[TimedModel]:
        """The model with this schedule, under the settings it is compiled with."""
        if schedule is None:
            with settings_for_models(late_hooks=False):
                yield self._dense
            return
        sparsify(self._sparse.model, schedule, **self._how)
        yield self._sparse

    def _note(self, progress: Progress | None) -> None:
        self._done += 1
        report(progress, self._done, (1 + self._repetitions) * len(self._subjects))


def _measured_once(timed: TimedModel, *, first: bool, sparse: bool) -> dict[str, Any]:
    """Fields of a row; some of the first of several schedules only."""
    found: dict[str, Any] = {}
    on_gpu = timed.on_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if first:
        found["first_generate_s"] = timed.seconds(timed.generate)
        timed.turn()
    if first and on_gpu:
        found["kernels"] = timed.kernels()
    if on_gpu and sparse:
        found["recompiled"] = timed.recompiled()
    if on_gpu:
        timed.turn()
        found["repeatable"] = timed.repeats_itself(REPEATS)
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _rows(
    model: nn.Module,
    without_schedule: nn.Module,
    load: Load,
    subjects: Sequence[Schedule | None],
    details: Sequence[dict[str, Any]],
    turns: Sequence[Sequence[Turn]],
) -> list[SpeedRow]:
    """Medians, and the sparsity of each schedule in the model `without_schedule` on the tokens it was timed on."""
    rows: list[SpeedRow] = []
    for schedule, detail, found in zip(subjects, details, turns, strict=True):
        realised, read = 0.0, weight_bytes_per_token(model)
        if schedule is not None:
            realised, read = realised_sparsity(without_schedule, schedule, found[0].text)
        token_ms = [each.token_ms for each in found]
        step_ms = [each.step_ms for each in found if each.step_ms is not None]
        compared = step_ms or token_ms
        median = statistics.median(compared)
        dense = rows[0].ms if rows else median
        same = all(each.text.equal(found[0].text) for each in found)
        rows.append(
            SpeedRow(
                target=schedule.sparsity if schedule else 0.0,
                realised=realised,
                ms_per_token=statistics.median(token_ms),
                repetitions=tuple(compared),
                ratio=dense / median if subjects[0] is None else None,
                bytes_per_token=read,
                step_ms=median if step_ms else None,
                prompt_tokens=load.long_prompt.shape[1],
                prompt_ms=statistics.median(each.prompt_ms for each in found),
                **{**detail, "repeatable": same and detail.get("repeatable") is not False},
            )
        )
    return rows

"""Decode speed on a GPU: the dense model as transformers compiles it against the sparse one, in one process."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.measure.sequential import realised_sparsity, uniform_while_dropping
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.modules.tokens import vocabulary
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import Score
from was_fx.sparse.sparsify import sparsify
from was_fx.sparse.state import sparse_state

Progress = Callable[[str], None]

# Steps that don't count at the start of a sequence: the first may compile, the second capture.
WARM_UP = 8
# Times of day of a prompt's forward: its median is of so many.
PROMPT_REPETITIONS = 5


@dataclass(frozen=True)
class GpuRow:
    """Speed of one model at one sparsity; dense rows have target 0.

    Attributes:
        target: nominal model sparsity.
        realised: model sparsity on the prompt and the tokens that were timed.
        step_ms: median time of a decode step, from one to the next on the GPU's clock.
        generate_ms: wall time per token of `generate()` with a static cache; None for the dense model.
        prompt_ms: forward of the long prompt.
        compile_s: wall time of the first `generate()`, everything compiled cold; 0.0 for later sparsities.
        recompiled: graphs compiled by `generate()` calls with other prompt lengths and numbers of tokens.
        kernels: launched in one decode step.
        repeatable: whether the tokens of all repeated runs are the same.
        bytes_per_token: bytes of weights read for one token, the head's included.
        peak_bytes: of GPU memory, both models included.
        ratio: dense step_ms over this one's.
    """

    target: float
    realised: float
    step_ms: float
    generate_ms: float | None
    prompt_ms: float
    compile_s: float
    recompiled: int
    kernels: int
    repeatable: bool
    bytes_per_token: int
    peak_bytes: int
    ratio: float


@torch.no_grad()
def gpu_speed(
    model: nn.Module,
    targets: Sequence[float],
    *,
    prompt: int = 128,
    tokens: int = 64,
    long_prompt: int = 2048,
    repetitions: int = 5,
    repeats: int = 20,
    score: Score | None = None,
    with_dense: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[GpuRow]:
    """Time greedy decoding of one sequence with a static cache.

    The dense model is compiled as transformers does for a static cache (mode "reduce-overhead"), the sparse one is a
    copy of it. Both take turns.

    Args:
        model: a dense causal LM on a CUDA device.
        targets: model sparsities, at least 0 and below 1.
        prompt: random tokens before those that are decoded.
        tokens: decoded per repetition, more than 24.
        long_prompt: tokens of the prompt whose forward is timed.
        repetitions: how often each is timed.
        repeats: runs whose tokens must be the same.
        score: WAS's by default.
        with_dense: time the dense model too; without it, `ratio` is 0.
        seed: of the random tokens.
        progress: told what begins.

    Returns:
        The dense row, then one per target.
    """
    if tokens <= 24:
        raise ValueError(f"tokens is {tokens}; expected more than 24, for a median after the warm-up")
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; the dense one is needed: was_fx.densify(model) first")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"the model is on {device}; expected a CUDA device (was_fx.decode_speed times a CPU)")
    say = progress or (lambda text: None)
    raise_recompile_limit()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary(model) or 2, (4, max(prompt, long_prompt, 256)), generator=generator)
    say("calibrating")
    schedules = [uniform_while_dropping(model, ids[:, :128], each, score) for each in targets]
    sparse = copy.deepcopy(model)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    dense = _Subject(model, ids.to(device), prompt, tokens, long_prompt, compiled)
    other = _Subject(sparse, ids.to(device), prompt, tokens, long_prompt, None)
    turns: list[Schedule | None] = [*([None] if with_dense else []), *schedules]
    found: list[list[float]] = [[] for _ in turns]
    details: list[dict[str, Any]] = []
    for schedule in turns:
        say("dense" if schedule is None else f"target {schedule.sparsity:.0%}")
        if schedule is not None:
            sparsify(sparse, schedule)
        torch.cuda.reset_peak_memory_stats()
        first = schedule is None or schedule is schedules[0]
        subject = dense if schedule is None else other
        details.append(subject.details(first=first, repeats=repeats, generates=schedule is not None))
    say("timing, in turns")
    for _ in range(repetitions):
        for index, schedule in enumerate(turns):
            if schedule is not None:
                sparsify(sparse, schedule)
            found[index].append((dense if schedule is None else other).steps()[0])
    rows = []
    for times, detail, schedule in zip(found, details, turns, strict=True):
        step, text = statistics.median(times), detail.pop("text")
        realised, read = 0.0, weight_bytes_per_token(model)
        if schedule is not None:
            realised, read = realised_sparsity(model, schedule, text)
        ratio = statistics.median(found[0]) / step if with_dense else 0.0
        target = schedule.sparsity if schedule else 0.0
        rows.append(GpuRow(target=target, realised=realised, step_ms=step, bytes_per_token=read, ratio=ratio, **detail))
    return rows


class _Subject:
    """A model with its cache, ready to be timed."""

    def __init__(
        self, model: nn.Module, ids: Tensor, prompt: int, tokens: int, long_prompt: int, compiled: Any
    ) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        self.prompt, self.long_prompt = ids[:1, :prompt], ids[:1, :long_prompt]
        self.step: Any = compiled or model
        self.cache: Any = None
        self.config: Any = model.config

    def details(self, *, first: bool, repeats: int, generates: bool) -> dict[str, Any]:
        """All that is measured once, warming everything up on the way."""
        warm_up = (lambda: self._generate(self.tokens)) if generates else self.steps
        compile_s = _seconds(warm_up) if first else 0.0
        recompiled, generate_ms = 0, None
        if generates:
            self._generate(self.tokens)
            graphs = _graphs()
            for cut, new in ((0, 16), (7, 40), (50, 20)):
                self._generate(new, self.prompt[:, cut:])
            recompiled = _graphs() - graphs
            generate_ms = self._generate_ms()
        self.steps()
        runs = [self.steps()[1] for _ in range(repeats)]
        return {
            "compile_s": compile_s,
            "generate_ms": generate_ms,
            "recompiled": recompiled,
            "prompt_ms": self._prompt_ms() if first else 0.0,
            "repeatable": all(each.equal(runs[0]) for each in runs),
            "kernels": self._kernels() if first else 0,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "text": torch.cat([self.prompt, runs[0]], dim=1),
        }

    def steps(self, count: int | None = None) -> tuple[float, Tensor]:
        """Median milliseconds of a decode step, and the tokens [1, tokens]."""
        from transformers import StaticCache

        count = count or self.tokens
        if self.cache is None:
            self.cache = StaticCache(config=self.config, max_cache_len=self.prompt.shape[1] + self.tokens)
        self.cache.reset()
        arguments = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        logits = self.model(input_ids=self.prompt, **arguments).logits
        position = torch.tensor([[self.prompt.shape[1]]], device=self.prompt.device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        text = []
        for event in events[:-1]:
            token = logits[:, -1].argmax(-1, keepdim=True)
            text.append(token)
            event.record()
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.step(input_ids=token, position_ids=position, **arguments).logits
            position = position + 1
        events[-1].record()
        torch.cuda.synchronize()
        gaps = [a.elapsed_time(b) for a, b in zip(events[WARM_UP:-1], events[WARM_UP + 1 :], strict=True)]
        return statistics.median(gaps) if gaps else 0.0, torch.cat(text, dim=1)

    def _generate(self, new: int, prompt: Tensor | None = None) -> Tensor:
        prompt = self.prompt if prompt is None else prompt
        return self.model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
        )

    def _generate_ms(self) -> float:
        short = 16
        self._generate(short)
        self._generate(self.tokens)
        times = [_seconds(partial(self._generate, new)) for _ in range(3) for new in (short, self.tokens)]
        gaps = [b - a for a, b in zip(times[::2], times[1::2], strict=True)]
        return 1e3 * statistics.median(gaps) / (self.tokens - short)

    def _prompt_ms(self) -> float:
        def forward() -> None:
            from transformers import StaticCache

            cache = StaticCache(config=self.config, max_cache_len=self.long_prompt.shape[1])
            self.model(input_ids=self.long_prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        forward()
        return 1e3 * statistics.median(_seconds(forward) for _ in range(PROMPT_REPETITIONS))

    def _kernels(self) -> int:
        """Kernels of one decode step."""
        counts = [self._kernels_of(count) for count in (WARM_UP, 2 * WARM_UP)]
        return round((counts[1] - counts[0]) / WARM_UP)

    def _kernels_of(self, count: int) -> int:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.steps(count)
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events() or [])


def _seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


__all__ = ["GpuRow", "gpu_speed"]

"""A model that decodes, prompted and timed again and again, on a CPU or a GPU."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_fx.compat.cuda import hold_gpu
from was_fx.compat.dynamo import graphs_compiled
from was_fx.compat.generation import cache_argument, may_be_taken_back, take_back
from was_fx.generate.greedy import Greedy
from was_fx.kernels.parts.devices import on
from was_fx.measure.token_clock import TokenClock

# New tokens that don't count at the start of a sequence where the first steps are other ones: on a GPU they capture a
# CUDA graph, and Python is not yet ahead of the GPU; on a CPU they may be recorded.
WARM_UP = 8

# How long the GPU waits for each step that is to be timed, so that Python has queued it by then.
AHEAD_MS = 2.0


@dataclass(frozen=True)
class Load:
    """What a model is timed on.

    Attributes:
        prompt: LongTensor [B, seq] of token ids, on the model's device.
        long_prompt: the same, of the prompt whose forward is timed alone.
        tokens: new tokens of a repetition, of each sequence; of `TimedModel.steps`, steps.
        cache: "static" or "dynamic".
        warm_up: how many of the tokens don't count in `Turn.token_ms`.
        together: S, the tokens of each sequence that a step of `TimedModel.steps` reads at once.
    """

    prompt: Tensor
    long_prompt: Tensor
    tokens: int
    cache: str
    warm_up: int = 0
    together: int = 1


@dataclass(frozen=True)
class Turn:
    """One repetition: milliseconds per token of `generate()`, per decode step (on a GPU with a static cache), and of
    the long prompt's forward; and the tokens [B, prompt and new] that `generate()` gave."""

    token_ms: float
    step_ms: float | None
    prompt_ms: float
    text: Tensor


class TimedModel:
    """A model with the call that makes its decode steps, and a cache for them.

    Attributes:
        load: what it is timed on.
        on_gpu: whether that is a GPU.
        has_steps: decode steps are timed by themselves: on a GPU with a static cache.
    """

    def __init__(self, model: Any, load: Load, step: Any) -> None:
        """
        Args:
            model: a causal LM, dense or sparsified.
            load: what it is timed on.
            step: called with the arguments of `model` for one step, as `generate()` calls it.
        """
        self.model, self.load, self._step = model, load, step
        self.on_gpu = load.prompt.is_cuda
        self.has_steps = self.on_gpu and load.cache == "static"
        self._likeliest = Greedy()
        self._cache_name = cache_argument(model)
        self._cache: Any = None
        self._first: Tensor | None = None  # the tokens after the prompt, while the cache holds that

    def turn(self) -> Turn:
        """Time everything once."""
        clock = TokenClock()
        text = self.generate(streamer=clock)
        step_ms = self.steps()[0] if self.has_steps else None
        return Turn(statistics.fmean(clock.steps()[self.load.warm_up :]), step_ms, self.prompt_ms(), text)

    def generate(self, new: int | None = None, prompt: Tensor | None = None, streamer: Any = None) -> Tensor:
        """Tokens [B, prompt and new] by greedy decoding; the load's prompt and number of tokens by default."""
        new, prompt = new or self.load.tokens, self.load.prompt if prompt is None else prompt
        text: Tensor = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation=self.load.cache,
            streamer=streamer,
        )
        return text

    def steps(self, count: int | None = None) -> tuple[float, Tensor]:
        """Median milliseconds of a decode step, from one to the next by the GPU's clock, and the tokens
        [B, count · S] that the steps were given: after S tokens come those that the model takes for the next of each.

        Python queues the steps before the GPU begins: it takes longer than a small model's step to call it, which
        `generate()` hides in ways of its own. The cache is static and stays the same from call to call; the prompt is
        read once where the steps can be taken out of it again.
        """
        with on(self.load.prompt.device):
            return self._steps(count)

    def _steps(self, count: int | None) -> tuple[float, Tensor]:
        count, together = count or self.load.tokens, self.load.together
        batch, length = self.load.prompt.shape
        if self._cache is None:
            self._cache = self._static_cache(length + self.load.tokens * together)
        arguments = {self._cache_name: self._cache, "use_cache": True, "logits_to_keep": together}
        token = self._first
        if token is None:
            self._cache.reset()
            token = self._next(self.model(input_ids=self.load.prompt, **arguments).logits)
        first, text, marks = token, [token], []
        position = torch.arange(length, length + together, device=token.device).repeat(batch, 1)
        if self.on_gpu:
            hold_gpu(AHEAD_MS * count)
        for _ in range(count):
            marks.append(self._mark())
            torch.compiler.cudagraph_mark_step_begin()
            token = self._next(self._step(input_ids=token, position_ids=position, **arguments).logits)
            text.append(token)
            position = position + together
        marks.append(self._mark())
        self._wait()
        if may_be_taken_back(self._cache):
            take_back(self._cache, count * together)
            self._first = first
        gaps = [_milliseconds(*pair) for pair in itertools.pairwise(marks[WARM_UP:])]
        return statistics.median(gaps) if gaps else 0.0, torch.cat(text[:-1], dim=1)

    def prompt_ms(self) -> float:
        """Milliseconds from a prompt on the device to the logits after it, with an empty cache: what the first new
        token takes, but for choosing it."""

        def forward() -> None:
            from transformers import DynamicCache

            tokens = self.load.long_prompt
            static = self.load.cache == "static"
            cache = self._static_cache(tokens.shape[1]) if static else DynamicCache(config=self.model.config)
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})

        return 1e3 * self.seconds(forward)

    def recompiled(self) -> int:
        """Graphs that `generate()` compiles for other lengths of prompt and text than those it has served."""
        before, prompt = graphs_compiled(), self.load.prompt
        for cut, new in ((0, 16), (7, 40), (50, 20)):
            self.generate(new, prompt[:, min(cut, prompt.shape[1] - 1) :])
        return graphs_compiled() - before

    def kernels(self) -> int | None:
        """Kernels that one decode step launches; None where steps are not timed."""
        if not self.has_steps:
            return None
        counts = [self._kernels_of(count) for count in (WARM_UP, 2 * WARM_UP)]
        return round((counts[1] - counts[0]) / WARM_UP)

    def repeats_itself(self, times: int) -> bool:
        """Whether so many runs give the same tokens: of decode steps where they are timed, else of `generate()`."""
        runs = [self.steps()[1] if self.has_steps else self.generate() for _ in range(times)]
        return all(each.equal(runs[0]) for each in runs)

    def seconds(self, function: Callable[[], object]) -> float:
        """Wall time of a call, to the end of what it starts on the GPU."""
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.load.prompt.device)

    def _next(self, logits: Tensor) -> Tensor:
        """What comes after each of the last S tokens, [B, S], by logits [B, S or more, V]."""
        last = logits[:, -self.load.together :]
        return self._likeliest(last.flatten(0, 1)).view(last.shape[:2])

    def _mark(self) -> Any:
        """Now, by the GPU's clock; on a CPU in seconds."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _static_cache(self, length: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=length)

    def _kernels_of(self, count: int) -> int:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.steps(count)
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events() or [])


def _milliseconds(begin: Any, end: Any) -> float:
    """Between two marks."""
    return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))

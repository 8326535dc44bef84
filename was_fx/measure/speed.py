"""`decode_speed`: time per token of a model, dense under torch.compile and sparse, interleaved in one process."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compile.options import Lowering
from was_fx.measure.calibrate import calibrate, recalibrate
from was_fx.measure.evaluate import evaluate
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.modules.tokens import vocabulary
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import Score
from was_fx.schedules.search.uniform import uniform
from was_fx.sparse.sparsify import sparsify
from was_fx.sparse.state import sparse_state

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SpeedRow:
    """Decode speed at one sparsity.

    Attributes:
        target: nominal model sparsity; 0.0 for the dense model.
        realised: model sparsity measured on the prompt and the tokens that were timed.
        ms_per_token: median over the repetitions.
        repetitions: ms per token of each repetition.
        ratio: dense ms per token over this one's; 1.0 for the dense model.
        bytes_per_token: bytes of weights read for one token, the head's included.
    """

    target: float
    realised: float
    ms_per_token: float
    repetitions: tuple[float, ...]
    ratio: float
    bytes_per_token: int


class TokenClock:
    """A streamer for `generate()` that notes when each token arrives, and hands them to another streamer.

    Attributes:
        times: seconds, by `time.perf_counter`; the first entry is the prompt, the second the first new token.
    """

    def __init__(self, inner: Any = None) -> None:
        self.times: list[float] = []
        self._inner = inner

    def put(self, tokens: Tensor) -> None:
        """Called by `generate()` with the prompt, and then with each new token on the CPU."""
        self.times.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(tokens)

    def end(self) -> None:
        """Called by `generate()` at the end."""
        if self._inner is not None:
            self._inner.end()

    def steps(self) -> list[float]:
        """Milliseconds of each decode step: from one new token to the next, so that the prompt does not count."""
        arrived = self.times[1:]
        return [1e3 * (after - before) for before, after in itertools.pairwise(arrived)]


def random_model(config: Any, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> nn.Module:
    """A causal LM with random weights, made on the device, for a configuration such as `LlamaConfig(...)`."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def decode_speed(
    config_or_model: Any,
    targets: Sequence[float],
    *,
    tokens: int = 32,
    prompt: int = 16,
    repetitions: int = 5,
    score: Score | None = None,
    cache: str = "dynamic",
    lowering: Lowering | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SpeedRow]:
    """Time greedy decoding of one sequence, dense and at uniform sparsities.

    The dense model is compiled by `torch.compile`, the sparse one is a copy of it that shares no storage, sparsified
    after a calibration and a recalibration on random tokens. They take turns in the same process, so a slow moment of
    the machine hits all of them. Compilation and prompts are not part of any time.

    Args:
        config_or_model: a dense causal LM, or a configuration for one with random bf16 weights on the CPU.
        targets: model sparsities, each at least 0 and below 1.
        tokens: new tokens per repetition, at least 2.
        prompt: random tokens before them.
        repetitions: how often each is timed.
        score: WAS's by default.
        cache: "dynamic" or "static", the KV cache.
        executor: "inductor" (default), or "eager" to compile neither model (tests; no statement about speed).
        seed: of the random weights and tokens.
        progress: called with (runs done, all runs).

    Returns:
        The dense row, then one per target.
    """
    if tokens < 2 or prompt < 1 or repetitions < 1:
        raise ValueError(
            f"tokens is {tokens}, prompt {prompt} and repetitions {repetitions}; expected at least 2, 1 and 1"
        )
    dense = config_or_model if isinstance(config_or_model, nn.Module) else random_model(config_or_model, seed=seed)
    if sparse_state(dense) is not None:
        raise ValueError("the model is sparsified; the dense one is needed: was_fx.densify(model) first")
    sparse = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary(dense) or 2, (8, max(prompt, 64)), generator=generator)
    calibration = calibrate(sparse, ids, score=score, text="random tokens")
    schedules = [recalibrate(sparse, uniform(calibration, target), ids, rounds=1) for target in targets]
    start = ids[:1, :prompt].to(next(dense.parameters()).device)
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "cache_implementation": cache}
    runs = _Runs(dense, sparse, schedules, start, arguments, executor)
    return runs.rows(runs.time(repetitions, progress))


class _Runs:
    """The dense model (index 0) and the sparse one at each schedule (1, 2, …), ready to take turns."""

    def __init__(
        self,
        dense: nn.Module,
        sparse: nn.Module,
        schedules: Sequence[Schedule],
        start: Tensor,
        arguments: dict[str, Any],
        lowering: Lowering | None,
    ) -> None:
        self.dense, self.sparse, self.schedules = dense, sparse, list(schedules)
        self.start, self.arguments, self.lowering = start, arguments, executor
        self.texts: dict[int, Tensor] = {}

    @torch.no_grad()
    def time(self, repetitions: int, progress: Progress | None) -> list[list[float]]:
        """Milliseconds per token: per model, one number per repetition. The first round compiles and is left out."""
        import torch._dynamo

        times: list[list[float]] = [[] for _ in range(1 + len(self.schedules))]
        total = (1 + repetitions) * len(times)
        before = self.dense._compiled_call_impl
        try:
            # As `sparsify` compiles: one graph for every length, and never a silent fall back to no graph.
            with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
                if self.lowering != "eager":
                    self.dense.compile(dynamic=True, fullgraph=True)
                for done in range(total):
                    index = done % len(times)
                    elapsed = self._once(index)
                    if done >= len(times):
                        times[index].append(elapsed)
                    if progress is not None:
                        progress(done + 1, total)
        finally:
            self.dense._compiled_call_impl = before
        return times

    def _once(self, index: int) -> float:
        model = self.dense if index == 0 else self._sparsified(index)
        clock = TokenClock()
        mask = torch.ones_like(self.start)
        text = model.generate(  # type: ignore[operator]
            self.start, attention_mask=mask, do_sample=False, streamer=clock, **self.arguments
        )
        self.texts[index] = text
        return statistics.fmean(clock.steps())

    def _sparsified(self, index: int) -> nn.Module:
        return sparsify(self.sparse, self.schedules[index - 1], executor=self.lowering)

    def rows(self, times: list[list[float]]) -> list[SpeedRow]:
        """Medians, with the sparsity that each schedule had on the tokens it was timed on."""
        everything = weight_bytes_per_token(self.dense)
        dense = statistics.median(times[0])
        rows = [SpeedRow(0.0, 0.0, dense, tuple(times[0]), 1.0, everything)]
        for index, schedule in enumerate(self.schedules, start=1):
            found = evaluate(self._sparsified(index), self.texts[index], prefill="all", lowering="eager")
            median = statistics.median(times[index])
            read = round(everything * (1 - found.bytes_saved))
            rows.append(SpeedRow(schedule.sparsity, found.realised, median, tuple(times[index]), dense / median, read))
        return rows


__all__ = ["SpeedRow", "TokenClock", "decode_speed", "random_model"]

"""The likeliest next tokens."""

from collections.abc import Callable
from functools import partial

from torch import Tensor


class Greedy:
    """Chooses the likeliest of a vocabulary, step after step; for steps that follow one another."""

    def __init__(self) -> None:
        self._on_gpu: Callable[[Tensor], Tensor] | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens [R] int64 by their scores [R, V]; of equal ones the first."""
        if not scores.is_cuda:
            return scores.argmax(dim=-1)
        if self._on_gpu is None:
            from was_fx.kernels.ops.argmax import argmax  # imports triton
            from was_fx.kernels.parts.arrivals import arrivals

            self._on_gpu = partial(argmax, counters=arrivals(scores))
        return self._on_gpu(scores)

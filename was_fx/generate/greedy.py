"""The likeliest next tokens."""

from torch import Tensor


class Greedy:
    """Chooses the likeliest of a vocabulary, step after step; for steps that follow one another."""

    def __init__(self) -> None:
        self._counters: Tensor | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens [R] int64 by their scores [R, V]; of equal ones the first."""
        if not scores.is_cuda:
            return scores.argmax(dim=-1)
        from was_fx.kernels.ops.argmax import argmax  # imports triton
        from was_fx.kernels.parts.arrivals import arrivals

        if self._counters is None:
            self._counters = arrivals(scores)
        return argmax(scores, self._counters)

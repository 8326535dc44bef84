"""Which implementation served a call, for whoever asks: `was_fx.check` and the tests."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Served:
    """One call of a sparse product.

    Attributes:
        weights: `data_ptr` of each weight [N_i, K] it read.
        implementation: name of what computed it.
        reason: why that one.
    """

    weights: tuple[int, ...]
    implementation: str
    reason: str


_noted: ContextVar[list[Served] | None] = ContextVar("calls of sparse products", default=None)


@contextlib.contextmanager
def noting_served() -> Iterator[list[Served]]:
    """The sparse products that this thread computes while the context lasts; replays of a CUDA graph call nothing."""
    noted: list[Served] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_served(weights: Sequence[Tensor], implementation: str, reason: str) -> None:
    """Tell whoever asks that `implementation` computes a product with these weights."""
    noted = _noted.get()
    if noted is not None:
        noted.append(Served(tuple(weight.data_ptr() for weight in weights), implementation, reason))

"""Which implementation served a call, for whoever asks: `was_fx.check` and the tests."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """What serves a call, and why; without a function, the usual product."""

    name: str
    reason: str
    function: Callable[..., Any] | None


@dataclass(frozen=True)
class Served:
    """One call of a sparse product.

    Attributes:
        weights: `data_ptr` of each weight [N_i, K] it read.
        implementation: name of what computed it.
        reason: why that one.
        eager: called from Python code that was asked for, not from a compiled graph.
    """

    weights: tuple[int, ...]
    implementation: str
    reason: str
    eager: bool


_noted: ContextVar[tuple[list[Served], tuple[CodeType, ...]] | None] = ContextVar(
    "calls of sparse products", default=None
)


@contextlib.contextmanager
def noting_served(*callers: CodeType) -> Iterator[list[Served]]:
    """The sparse products that this thread computes while the context lasts; replays of a CUDA graph call nothing.

    Args:
        callers: code of which some is running when a call is eager; compiled code has been traced away.
    """
    noted: list[Served] = []
    token = _noted.set((noted, callers))
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_served(weights: Sequence[Tensor], implementation: str, reason: str) -> None:
    """Tell whoever asks that `implementation` computes a product with these weights."""
    asked = _noted.get()
    if asked is not None:
        noted, callers = asked
        eager = bool(callers) and _is_running(callers)
        noted.append(Served(tuple(weight.data_ptr() for weight in weights), implementation, reason, eager))


def _is_running(codes: tuple[CodeType, ...]) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False

"""Several ways of dropping in one forward pass: rows of a batch with thresholds of their own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from was_fx.modules.linears import LinearModule, looking_at_inputs
from was_fx.schedules.files.linear_schedule import LinearSchedule


def thresholds_by_row(entries: Sequence[LinearSchedule], norms: Tensor, sequences: int = 1) -> Tensor:
    """t of a Linear by its entry for each of B ways, for inputs [B · sequences, seq, K].

    Args:
        entries: without thresholds of their own for each channel.
        norms: g [K].
        sequences: rows of each way.

    Returns:
        [B · sequences, 1, K] fp32, or [K] where all are alike.
    """
    numbers = [(each.threshold, each.exponent) for each in entries]
    made = {key: each.channel_thresholds(norms) for key, each in zip(numbers, entries, strict=True)}
    if len(made) == 1:
        return made[numbers[0]]
    return torch.stack([made[key] for key in numbers]).repeat_interleave(sequences, 0)[:, None]


@contextmanager
def watching_rows(linears: Mapping[str, LinearModule], rows: tuple[int, int]) -> Iterator[list[bool]]:
    """Note of each input while the context lasts whether it is [B, seq, K], where `rows` is (B, seq).

    Experts see the tokens that are sent to them, so that of them it is never so.
    """
    seen = [False for linear in linears.values() if linear.expert is not None]

    def look(_: str, x: Tensor) -> None:
        seen.append(x.shape[:-1] == rows)

    with looking_at_inputs({name: each for name, each in linears.items() if each.expert is None}, look):
        yield seen

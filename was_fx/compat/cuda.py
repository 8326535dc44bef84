"""Private names of torch.cuda, each with what it is for."""

import torch

# Clock cycles of a GPU's multiprocessors per millisecond: those of an H100 at its highest clock, more than most have.
_CYCLES = 2_000_000


def hold_gpu(milliseconds: float) -> None:
    """Let the current stream wait about so long, while Python goes on queueing work on it."""
    torch.cuda._sleep(int(milliseconds * _CYCLES))

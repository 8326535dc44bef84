"""Add a number to many counters at once: `torch.ops.was.advance`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.parts.registration import register_op


def advance(counters: Sequence[Tensor], step: int) -> None:
    """Add `step` to every counter (integer tensors of one element), in place and in one kernel."""
    torch._foreach_add_(list(counters), step)


advance_op = register_op("advance(Tensor(a!)[] counters, int step) -> ()", advance, lambda counters, step: None)

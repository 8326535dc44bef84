"""Add a number to many counters at once: `torch.ops.was.advance`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def advance(counters: Sequence[Tensor], step: int) -> None:
    """Add `step` to every counter (integer tensors of one element), in place and in one kernel."""
    torch._foreach_add_(list(counters), step)


_library = torch.library.Library("was", "FRAGMENT")
_library.define("advance(Tensor(a!)[] counters, int step) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("advance", advance, "CompositeExplicitAutograd")
torch.library.register_fake("was::advance", lambda counters, step: None, lib=_library)

advance_op = torch.ops.was.advance.default

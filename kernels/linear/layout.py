"""How a sparse Linear's weight lies in memory, and those of experts, which are many in one tensor.

A skipped input channel must be a skipped contiguous row, so the storage becomes Wᵀ [K, N] row-contiguous while the
tensor keeps its shape [N, K] with strides (1, N). There is one copy of the weight at any time, plus the one that is
being moved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_input_major(weight: Tensor) -> None:
    """Move weight [N, K] or [E, N, K] in place into input-major storage; a no-op when it is there already."""
    with _mode_of(weight):
        if not weight.mT.is_contiguous():
            weight.data = weight.data.mT.contiguous().mT


def restore(weight: Tensor, stride: tuple[int, ...]) -> None:
    """Move weight in place into a storage of its own with the given strides; values are unchanged bit by bit."""
    with _mode_of(weight):
        data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
        weight.data = data.copy_(weight.data)


@contextmanager
def _mode_of(weight: Tensor) -> Iterator[None]:
    """Make tensors of the kind that the weight is, in inference mode or not: it can't change from one to the other."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield

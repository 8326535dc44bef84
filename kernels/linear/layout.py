"""How a sparse Linear's weight lies in memory.

A skipped input channel must be a skipped contiguous row, so the storage becomes Wᵀ [K, N] row-contiguous while the
tensor keeps its shape [N, K] with strides (1, N). There is one copy of the weight at any time, plus the one that is
being moved. Siblings share one storage that holds their Wᵀ one after the other.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def wants_input_major(weight: Tensor) -> bool:
    """Whether decode has a kernel that gathers this weight's rows of Wᵀ.

    Not for fp16 on a CPU: the product of a whole prompt with a column-major fp16 weight was over 100 times slower.
    """
    return not (weight.device.type == "cpu" and weight.dtype == torch.float16)


def follows(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins where `first` ends, in the same storage (both dense in memory)."""
    return second.data_ptr() == first.data_ptr() + first.numel() * first.element_size() and (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )


@torch.inference_mode(False)
@torch.no_grad()
def to_input_major(weight: Tensor) -> None:
    """Move weight [N, K] in place into input-major storage; a no-op when it is there already."""
    if not weight.t().is_contiguous():
        weight.data = weight.data.t().contiguous().t()


@torch.inference_mode(False)
@torch.no_grad()
def restore(weight: Tensor, stride: tuple[int, ...]) -> None:
    """Move weight in place into a storage of its own with the given strides; values are unchanged bit by bit."""
    data = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
    weight.data = data.copy_(weight.data)


@torch.no_grad()
def fuse_rows(tensors: Sequence[Tensor]) -> bool:
    """Move tensors in place, one after the other, into one storage.

    Every tensor must be dense in memory; shapes and strides stay as they are.

    Returns:
        Whether anything moved: False when they already lie so.
    """
    if all(follows(a, b) for a, b in pairwise(tensors)):
        return False
    storage = tensors[0].new_empty(sum(t.numel() for t in tensors))
    offset = 0
    for tensor in tensors:
        home = storage.as_strided(tensor.shape, tensor.stride(), offset)
        tensor.data = home.copy_(tensor.data)
        offset += tensor.numel()
    return True

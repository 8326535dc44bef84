"""Private names of torch's tensors, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, by the counter that autograd keeps; -1 for one of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def in_backward() -> bool:
    """Whether this thread is in a backward pass, where checkpointing computes forwards again."""
    return torch._C._current_graph_task_id() != -1


def storage_id(tensor: Tensor) -> int:
    """What tells a tensor's storage from others. Fake tensors have one too, and no address."""
    return tensor.untyped_storage()._cdata


def part_of(tensor: Tensor) -> Tensor:
    """The very tensor that holds this rank's part of a DTensor, where `to_local()` may give a view; else itself."""
    return getattr(tensor, "_local_tensor", tensor)


def take_strides(tensor: Any, again: Any) -> None:
    """Let a DTensor have the data and the strides of another one; `.data` alone leaves it with its old strides."""
    tensor.data = again
    tensor._spec = again._spec


def without_memory() -> AbstractContextManager[Any]:
    """While it lasts, tensors that are made have a shape, a dtype, strides and a device, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()

"""Private names of torch that kernels need, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

import torch
from torch import Tensor


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, by the counter that autograd keeps. One of inference mode has none."""
    return tensor._version


def storage_id(storage: torch.UntypedStorage) -> int:
    """What tells a storage from others that are alive."""
    return storage._cdata

"""How the programs of a kernel tell which of them ends last, and so may use what all have stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.registration import register_op

# Counters that any kernel may use at once.
COUNTERS = 128


@triton.jit
def last(arrivals_ptr, programs):
    """Whether the other of `programs` came here before: what they stored can be read, and the counter is 0 again."""
    tl.debug_barrier()  # the stores of all threads come before the arrival, which is one thread's
    is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


def arrivals(x: Tensor) -> Tensor:
    """[COUNTERS] int32 zeros, on the device of `x`.

    Every call of a kernel leaves zeros, so one tensor serves all calls that follow one another. Calls that may run at
    the same time need one each, so a graph makes its own. An op, lest a compiler takes the zeros for a constant that
    all who run the graph share.
    """
    return x.new_zeros(COUNTERS, dtype=torch.int32)


arrivals_op = register_op("arrivals(Tensor x) -> Tensor", arrivals, arrivals)

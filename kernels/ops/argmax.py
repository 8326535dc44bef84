"""The column of the largest of each of a few long rows, by one kernel.

    index[r] = the first column of the largest x[r, :], NaN above all                  x [R, V]

A greedy step chooses among a vocabulary's logits. Each program looks at a part of a row, and the one that ends last at
what the others found; torch's reduction of one row is done by few multiprocessors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.arrivals import COUNTERS, arrivals, last
from was_fx.kernels.parts.triton_parts import begin, launch_options, order, serves

# Columns that a program looks at.
BLOCK = 2048


@triton.jit
def _argmax(
    x_ptr,  # [R, V], rows so far apart
    stride,
    best_ptr,  # [R, programs of a row] int64
    index_ptr,  # [R] int64
    arrivals_ptr,  # [R] int32, 0 before and after
    V,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # programs of a row, as a power of two
    PDL: tl.constexpr,
):
    begin(PDL)
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * stride + columns, mask=columns < V, other=float("-inf"))
    best_ptr += row * parts
    tl.store(best_ptr + part, tl.max(order(x, columns), axis=0))
    if last(arrivals_ptr + row, parts):
        others = tl.arange(0, PARTS)
        best = tl.load(best_ptr + others, mask=others < parts, other=-(2**63))
        # The low half of `order` is the column, taken off.
        tl.store(index_ptr + row, -tl.max(best, axis=0) & 0xFFFFFFFF)


def fits(x: Tensor) -> bool:
    """Whether a tensor is of a shape and strides that the kernel is for, wherever it lies."""
    return x.dim() == 2 and 0 < x.shape[0] <= COUNTERS and x.shape[1] > 0 and x.stride(1) == 1


def reference(x: Tensor) -> Tensor:
    """The kernel's meaning in plain PyTorch.

    Args:
        x: [R, V], floating point.

    Returns:
        [R] int64, the column of the largest of each row; of equal ones the first.
    """
    return x.argmax(dim=-1)


def argmax(x: Tensor, counters: Tensor | None = None) -> Tensor:
    """See `reference`; by Triton where it serves. `counters` are of `arrivals`; without them a launch makes some."""
    if not serves(x) or not fits(x):
        return reference(x)
    rows, columns = x.shape
    parts = triton.cdiv(columns, BLOCK)
    index = x.new_empty(rows, dtype=torch.int64)
    _argmax[(parts, rows)](
        x,
        x.stride(0),
        x.new_empty((rows, parts), dtype=torch.int64),
        index,
        arrivals(x) if counters is None else counters,
        columns,
        BLOCK=BLOCK,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8,
        **launch_options(x),
    )
    return index

"""The k largest of each of a few short rows, by one kernel: `torch.ops.was.few_topk`.

    values[r, i], index[r, i] = the i-th largest of x[r, :] and its column              x [R, E]

A router chooses among some hundred experts. An entry's place is the number of entries that come before it: the greater
ones, and of equal ones those to its left. As for torch.topk, NaN is the greatest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import DTYPES, begin, launch_options, order, serves

# Each entry is compared with every other.
MAX_ENTRIES = 1024
MAX_ROWS = 8

# Rows of more entries than _ALL_AT_ONCE are compared with so many at once.
_AT_ONCE, _ALL_AT_ONCE = 64, 128


@triton.jit
def _count_greater(others, own):
    """How many of the others are greater than each of `own`."""
    # Down the columns, which are the threads': a sum across threads takes several times as many instructions.
    return tl.sum((others[:, None] > own[None, :]).to(tl.int32), axis=0)


@triton.jit
def choose(
    x_ptr,  # [E]
    x,  # [ENTRIES]: the same numbers; -inf past E
    values,  # [ENTRIES]: what is stored of each
    value_ptr,  # [k]
    index_ptr,  # [k] int64
    E,
    k,
    ENTRIES: tl.constexpr,  # E as a power of two
    AT_ONCE: tl.constexpr,
):
    """Store the values and the columns of the k largest of x."""
    entries = tl.arange(0, ENTRIES)
    own = order(x, entries)
    if AT_ONCE == ENTRIES:
        place = _count_greater(own, own)
    else:
        place = tl.zeros([ENTRIES], tl.int32)
        for first in tl.range(0, ENTRIES, AT_ONCE):
            others = first + tl.arange(0, AT_ONCE)
            other = tl.load(x_ptr + others, mask=others < E, other=float("-inf"))
            place += _count_greater(order(other, others), own)
    chosen = (entries < E) & (place < k)
    tl.store(value_ptr + place, values, mask=chosen)
    tl.store(index_ptr + place, entries.to(tl.int64), mask=chosen)


@triton.jit
def _few_topk(
    x_ptr,  # [R, E]
    value_ptr,  # [R, k]
    index_ptr,  # [R, k] int64
    E,
    k,
    ENTRIES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0)
    entries = tl.arange(0, ENTRIES)
    x_ptr += row * E
    x = tl.load(x_ptr + entries, mask=entries < E, other=float("-inf"))
    choose(x_ptr, x, x, value_ptr + row * k, index_ptr + row * k, E, k, ENTRIES, AT_ONCE)


def fits(x: Tensor, k: int) -> bool:
    """Whether x [..., E] is of a dtype and of as few and short rows as the kernel is for, wherever it lies."""
    entries = x.shape[-1] if x.dim() else 0
    return x.dtype in DTYPES and 1 <= k <= entries <= MAX_ENTRIES and x.numel() <= MAX_ROWS * entries


def supports(x: Tensor, k: int) -> bool:
    """Whether the kernel takes the k largest of the rows of x [..., E]."""
    return serves(x) and fits(x, k)


def entry_blocks(entries: int) -> dict[str, int]:
    """The sizes of blocks that `choose` compares, for rows of so many entries."""
    padded = triton.next_power_of_2(entries)
    return {"ENTRIES": padded, "AT_ONCE": padded if padded <= _ALL_AT_ONCE else _AT_ONCE}


def reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        x: [..., E] of a floating dtype.
        k: how many, 1 … E.

    Returns:
        values [..., k] of x's dtype, the largest first, and their columns [..., k] int64.
    """
    values, index = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), index[..., :k].contiguous()


def few_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not supports(x, k):
        return reference(x, k)
    values, index = fake(x, k)
    blocks = entry_blocks(x.shape[-1])
    _few_topk[(x.numel() // x.shape[-1],)](
        x.contiguous(),
        values,
        index,
        x.shape[-1],
        k,
        **blocks,
        num_warps=4 if blocks["ENTRIES"] <= 256 else 8,
        **launch_options(x),
    )
    return values, index


def fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the op returns, uninitialised."""
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


few_topk_op = register_op("few_topk(Tensor x, int k) -> (Tensor, Tensor)", few_topk, fake)

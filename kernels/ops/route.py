"""A router: its Linear, the softmax and the k largest of each of a few rows, by one kernel: `torch.ops.was.route`.

    logits = x Wᵀ + b                                            x [..., K], W [E, K], b [E] -> logits [..., E]
    values[r, i], index[r, i] = the score and the column of the i-th largest of logits[r, :]

The score is the logit, or its softmax. The rows of W are spread among programs, and the last of them to end chooses. No
kernel of a step writes W, so its rows are on their way before the kernel that computes x has ended.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import few_topk
from was_fx.kernels.parts.arrivals import arrivals, last
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, serves

# A program holds whole rows of W.
MAX_CHANNELS = 8192


class Tile(NamedTuple):
    """Rows of W that a program multiplies, a power of two, and its warps."""

    rows: int
    warps: int


@triton.jit
def _route(
    x_ptr,  # [R, K]
    weight_ptr,  # [E, K]
    bias_ptr,  # [E], or None
    logit_ptr,  # [R, E]
    value_ptr,  # [R, k]
    index_ptr,  # [R, k] int64
    arrivals_ptr,  # [R] int32, 0 before and after
    E,
    K,
    k,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # K as a power of two
    ENTRIES: tl.constexpr,  # E as a power of two
    AT_ONCE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1)
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    inside = (outputs < E)[:, None] & (channels < K)[None, :]
    weight = tl.load(weight_ptr + outputs[:, None] * K + channels[None, :], mask=inside, other=0.0)
    begin(PDL)
    x = tl.load(x_ptr + row * K + channels, mask=channels < K, other=0.0)
    logits = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + outputs, mask=outputs < E, other=0.0).to(tl.float32)
    logit_ptr += row * E
    tl.store(logit_ptr + outputs, logits.to(logit_ptr.dtype.element_ty), mask=outputs < E)
    if last(arrivals_ptr + row, tl.num_programs(0)):
        entries = tl.arange(0, ENTRIES)
        found = tl.load(logit_ptr + entries, mask=entries < E, other=float("-inf"))
        scores = found
        if SOFTMAX:
            powers = tl.exp(found.to(tl.float32) - tl.max(found.to(tl.float32), axis=0))
            scores = powers / tl.sum(powers, axis=0)
        few_topk.choose(
            logit_ptr, found, scores, value_ptr + row * k, index_ptr + row * k, E, k, ENTRIES, AT_ONCE
        )  # fmt: skip


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> bool:
    """Whether a router is of dtypes, sizes and strides that the kernel is for, wherever it lies."""
    entries, channels = weight.shape
    rows = x.numel() // channels
    given = [weight] if bias is None else [weight, bias]
    return (
        all(each.dtype == x.dtype and each.device == x.device and each.is_contiguous() for each in given)
        and channels <= MAX_CHANNELS
        and rows > 0
        and few_topk.fits(x.new_empty((rows, entries), device="meta"), k)
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        x: [..., K].
        weight: [E, K].
        bias: [E], or None.
        k: how many, 1 … E.
        softmax: whether scores are the softmax of the logits, in fp32; else the logits themselves.

    Returns:
        logits [..., E] of x's dtype; the scores [..., k] of the largest of them, the largest first, fp32 with `softmax`
        and of x's dtype without; and their columns [..., k] int64. Of equal logits the first comes first.
    """
    logits = torch.nn.functional.linear(x, weight, bias)
    values, index = few_topk.reference(logits, k)
    if softmax:
        values = logits.softmax(-1, dtype=torch.float32).gather(-1, index)
    return logits, values, index


def tile(entries: int, channels: int, tokens: int) -> Tile:
    """Of W [entries, channels]: a row for each program, and several where more than 512 programs would share them."""
    rows = max(1, min(4, triton.next_power_of_2(entries) * tokens // 512))
    return Tile(rows, 4 if entries <= 256 and channels <= 4096 else 8)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    softmax: bool,
    counters: Tensor | None = None,
    *,
    by: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves. `counters` are of `arrivals`; without them a launch makes some."""
    if not serves(x) or not fits(x, weight, bias, k):
        return reference(x, weight, bias, k, softmax)
    entries, channels = weight.shape
    tokens = x.numel() // channels
    by = tile(entries, channels, tokens) if by is None else by
    logits, values, index = fake(x, weight, bias, k, softmax)
    _route[(triton.cdiv(entries, by.rows), tokens)](
        x.contiguous(),
        weight,
        bias,
        logits,
        values,
        index,
        arrivals(x) if counters is None else counters,
        entries,
        channels,
        k,
        ROWS=by.rows,
        CHANNELS=triton.next_power_of_2(channels),
        **few_topk.entry_blocks(entries),
        SOFTMAX=softmax,
        num_warps=by.warps,
        **launch_options(x),
    )
    return logits, values, index


def fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, softmax: bool, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    rows = x.shape[:-1]
    values = x.new_empty((*rows, k), dtype=torch.float32 if softmax else x.dtype)
    return x.new_empty((*rows, weight.shape[0])), values, x.new_empty((*rows, k), dtype=torch.int64)


# It leaves `counters` as they were.
route_op = register_op(
    "route(Tensor x, Tensor weight, Tensor? bias, int k, bool softmax, Tensor? counters=None) "
    "-> (Tensor, Tensor, Tensor)",
    route,
    fake,
)

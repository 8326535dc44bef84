"""What the Triton kernels of this folder share: when they run, how they are launched, and pieces of their bodies."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Linears that share an input and one call; each has a threshold and a weight of its own.
MAX_SIBLINGS = 4

# What the kernels read and write; they calculate in fp32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def serves(tensor: Tensor) -> bool:
    """Whether Triton kernels can read this tensor: on CUDA (Ampere and later), or under the interpreter."""
    if tensor.dtype not in DTYPES:
        return False
    return capable(tensor.device) or (tensor.device.type == "cpu" and interpreted())


def capable(device: torch.device) -> bool:
    """Whether this is a GPU that the kernels are written for."""
    return device.type == "cuda" and _capability(device.index or 0) >= (8, 0)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def launches_ahead(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch (Hopper and later), and WAS_FX_NO_PDL=1 doesn't turn it off.

    The next kernel of the stream is launched while this one runs and waits in `begin`, so that its launch costs no
    time of its own.
    """
    capable_of_it = device.type == "cuda" and _capability(device.index or 0) >= (9, 0)
    return capable_of_it and not os.environ.get("WAS_FX_NO_PDL")


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """How a kernel that reads `tensor` is launched."""
    return {"PDL": True, "launch_pdl": True} if launches_ahead(tensor.device) else {"PDL": False}


def slots(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, filled up to MAX_SIBLINGS kernel arguments with the first of them, which is not read there."""
    return [*tensors, *[tensors[0] if tensors else None] * (MAX_SIBLINGS - len(tensors))]


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernels before this one, then let the next be launched. What they write is read only after this."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def order(x, columns):
    """int64 that is ordered as x is, NaN above all; of equal ones the first is the greatest."""
    x = x.to(tl.float32)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) - columns


@triton.jit
def sum_partials(
    partial_ptr,  # [SPLITS, width] fp32
    channels,  # block of column numbers
    mask,
    width,
    SPLITS: tl.constexpr,
):
    """Σ over the splits, always in the same order. fp32."""
    total = tl.load(partial_ptr + channels, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * width + channels, mask=mask, other=0.0)
    return total


@triton.jit
def list_kept(
    keep,  # [SEGMENTS, SEGMENT] bool
    channels,  # [SEGMENTS, SEGMENT]
    segments,  # [SEGMENTS]
    index_ptr,  # [T, SEGMENT] of one sibling
    count_ptr,  # [T] of one sibling
    T,
    SEGMENT: tl.constexpr,
):
    """Write the kept channels of each segment to the front of its part of the list, and how many they are."""
    ones = keep.to(tl.int32)
    position = tl.cumsum(ones, axis=1) - 1
    tl.store(index_ptr + segments[:, None] * SEGMENT + position, channels, mask=keep)
    tl.store(count_ptr + segments, tl.sum(ones, axis=1), mask=segments < T)


@triton.jit
def find_sibling(tile, N0, N1, N2, N3, G: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of G siblings a tile of output channels lies in: (g, its tile there, where its outputs start, their N)."""
    g, start, n = 0, 0, N0
    if G > 1:
        tiles = tl.cdiv(N0, COLUMNS)
        if tile >= tiles:
            g, start, n, tile = 1, N0, N1, tile - tiles
            if G > 2:
                tiles = tl.cdiv(N1, COLUMNS)
                if tile >= tiles:
                    g, start, n, tile = 2, N0 + N1, N2, tile - tiles
                    if G > 3:
                        tiles = tl.cdiv(N2, COLUMNS)
                        if tile >= tiles:
                            g, start, n, tile = 3, N0 + N1 + N2, N3, tile - tiles
    return g, tile, start, n


@triton.jit
def of_sibling(g, p0, p1, p2, p3):
    """The pointer of sibling g."""
    found = p0
    if g == 1:
        found = p1
    if g == 2:
        found = p2
    if g == 3:
        found = p3
    return found


@triton.jit
def share_of_list(count_ptr, T, K, split, splits, SEGMENTS: tl.constexpr):
    """Kept channels of each segment and up to its end, both [SEGMENTS], and the ranks first … last - 1 of a split.

    Without a list (None) there is one segment, and every channel is kept.
    """
    segments = tl.arange(0, SEGMENTS)
    counts = segments + K if count_ptr is None else tl.load(count_ptr + segments, mask=segments < T, other=0)
    total = tl.sum(counts, axis=0)
    return counts, tl.cumsum(counts, axis=0), (total * split) // splits, (total * (split + 1)) // splits


@triton.jit
def listed_channels(
    x_ptr,
    index_ptr,
    t_ptr,
    counts,  # [SEGMENTS]
    ends,  # [SEGMENTS]: kept channels up to the end of each segment
    row,
    last,
    tokens,  # [TOKENS]
    M,
    K,
    TOKENS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The kept channels of the ranks row, …, row + ROWS - 1, as far as `last`, and x̃ there in fp32; without a list
    (None) the ranks themselves."""
    rank = row + tl.arange(0, ROWS)
    listed = rank < last
    if index_ptr is None:
        k = tl.where(listed, rank, 0)
    else:
        if SEGMENTS == 1:
            place = rank
        else:
            before = ends[:, None] <= rank[None, :]
            segment = tl.sum(before.to(tl.int32), axis=0)
            place = segment * SEGMENT + rank - tl.sum(tl.where(before, counts[:, None], 0), axis=0)
        k = tl.load(index_ptr + place, mask=listed, other=0)
    if TOKENS == 1:
        x = tl.load(x_ptr + k, mask=listed, other=0.0).to(tl.float32)
    else:
        inside = (tokens < M)[:, None] & listed[None, :]
        x = tl.load(x_ptr + tokens[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        threshold = tl.load(t_ptr + k, mask=listed, other=0.0)
        x = tl.where(tl.abs(x) <= threshold[None, :], 0.0, x)
    return k, x

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
    if tensor.is_cuda:
        return _capability(tensor.device.index or 0) >= (8, 0)
    return tensor.device.type == "cpu" and interpreted()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """Programmatic dependent launch where the device has it (Hopper and later).

    The next kernel of the stream is launched while this one runs and waits in `begin`, so that its launch costs no
    time of its own. WAS_FX_NO_PDL=1 turns it off.
    """
    pdl = tensor.is_cuda and _capability(tensor.device.index or 0) >= (9, 0) and not os.environ.get("WAS_FX_NO_PDL")
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


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

"""Few tokens on a CPU with quantised weights, in C++: only the kept rows of codes are read (`kernels/cpu/body.inc`)."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.cpu.library import DTYPES, KINDS, kind, library
from was_fx.kernels.linear.cpu_gather import pointers
from was_fx.kernels.parts.served import Choice
from was_fx.kernels.quantized.rows import QuantizedRows

# Most tokens of a call: with more, few rows are left out.
MAX_TOKENS = 8


def supports(x: Tensor, rows: Sequence[QuantizedRows]) -> bool:
    """Whether this serves x [..., K] and these weights: few tokens on a CPU, one format, contiguous, a library."""
    if not x.is_cpu or x.dtype not in DTYPES or not x.numel() or library() is None:
        return False
    if x.numel() > MAX_TOKENS * x.shape[-1] or len({each.format for each in rows}) > 1:
        return False
    return all(each.codes.is_contiguous() and (each.groups is None or each.groups.is_contiguous()) for each in rows)


def write_out(rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """Wᵀ [K, N] in a floating dtype, by all threads where there is a library."""
    loaded = library()
    codes, scales, groups = rows.codes, rows.scales, rows.groups
    if loaded is None or not codes.is_cpu or dtype not in DTYPES:
        return rows.dequantize(dtype)
    outputs, channels = rows.shape
    out = torch.empty(channels, outputs, dtype=dtype)
    loaded.was_write_out(
        kind(),
        DTYPES[dtype],
        codes.contiguous().data_ptr(),
        scales.contiguous().data_ptr(),
        None if groups is None else groups.contiguous().data_ptr(),
        0 if groups is None else outputs // groups.shape[1],
        channels,
        outputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def choice() -> Choice:
    """What is said of a call that this serves."""
    kernels = KINDS[min(kind(), KINDS.index("avx512"))]
    return Choice("cpu_quantized", f"few tokens on a CPU, rows of codes contiguous; {kernels} kernels", sparse_linear)


def sparse_linear(
    x: Tensor,
    rows: Sequence[QuantizedRows],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor | None],
) -> Tensor:
    """`was::quantized_linear` for few tokens; see `quantized_linear.reference` for the meaning.

    Args:
        x: [..., K]; sums are fp32 and do not depend on the number of threads.
        rows: weights [N_i, K] of one format.
        biases: [N_i] of x's dtype, or None.
        thresholds: [K] fp32; None keeps every channel.

    Returns:
        [..., ΣN_i], x's dtype.
    """
    loaded = library()
    assert loaded is not None  # `supports` asked
    x = x.contiguous()
    channels = x.shape[-1]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    limits = [None if threshold is None else threshold.contiguous() for threshold in thresholds]
    sizes = [each.shape[0] for each in rows]
    y = x.new_empty(*x.shape[:-1], sum(sizes))
    groups = [each.groups for each in rows]
    per_group = [size // each.shape[1] if each is not None else 0 for size, each in zip(sizes, groups, strict=True)]
    loaded.was_gather(
        kind(),
        DTYPES[x.dtype],
        1 if groups[0] is None else 2,
        x.data_ptr(),
        pointers([each.codes for each in rows]),
        pointers(biases),
        pointers(limits),
        (ctypes.c_int64 * len(sizes))(*sizes),
        y.data_ptr(),
        x.numel() // channels,
        channels,
        len(sizes),
        torch.get_num_threads(),
        pointers([each.scales for each in rows]),
        pointers(groups),
        (ctypes.c_int64 * len(sizes))(*per_group),
    )
    return y

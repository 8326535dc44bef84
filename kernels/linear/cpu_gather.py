"""Few tokens on a CPU, in C++: only the kept rows of Wᵀ are read (`kernels/cpu/body.inc`)."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from was_fx.kernels.cpu.library import DTYPES, KINDS, kind, library
from was_fx.kernels.parts.served import Choice


@functools.cache
def max_tokens(dtype: torch.dtype) -> int:
    """Most tokens of a call. Rows that any of them keeps are read once for all; with more tokens few rows are left out,
    and a dense product is faster (`benchmarks/cpu_kernels.py`): sooner where the processor multiplies pairs of bf16."""
    return 4 if dtype == torch.bfloat16 and KINDS[kind()] in ("avx512bf16", "amx") else 8


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and weights [N_i, K]: few tokens on a CPU, Wᵀ row-contiguous, a library."""
    if not x.is_cpu or x.dtype not in DTYPES or not x.numel() or library() is None:
        return False
    if x.numel() > max_tokens(x.dtype) * x.shape[-1]:
        return False
    return all(w.dtype == x.dtype and w.t().is_contiguous() for w in weights)


@functools.cache
def choice() -> Choice:
    """What is said of a call that this serves."""
    kernels = KINDS[min(kind(), KINDS.index("avx512"))]
    return Choice("cpu_gather", f"few tokens on a CPU, rows of Wᵀ contiguous; {kernels} kernels", sparse_linear)


def sparse_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor] | None
) -> Tensor:
    """`was::sparse_linear` for few tokens; see `sparse_linear.reference` for the meaning.

    Args:
        x: [..., K]; sums are fp32 and do not depend on the number of threads.
        weights: [N_i, K], each Wᵀ row-contiguous.
        biases: [N_i] or None.
        thresholds: [K] fp32; None keeps every channel.

    Returns:
        [..., ΣN_i], x's dtype.
    """
    loaded = library()
    assert loaded is not None  # `supports` asked
    if len(weights) == 1:
        return _one(loaded, x, weights[0], biases[0], None if thresholds is None else thresholds[0])
    x = x.contiguous()
    channels = x.shape[-1]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    limits = None if thresholds is None else [threshold.contiguous() for threshold in thresholds]
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(*x.shape[:-1], sum(sizes))
    loaded.was_gather(
        kind(),
        DTYPES[x.dtype],
        0,
        x.data_ptr(),
        pointers(weights),
        pointers(biases),
        None if limits is None else pointers(limits),
        (ctypes.c_int64 * len(sizes))(*sizes),
        y.data_ptr(),
        x.numel() // channels,
        channels,
        len(sizes),
        torch.get_num_threads(),
        None,
        None,
        None,
    )
    return y


def _one(loaded: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    """One Linear, with as little Python as can be: it takes as long as a small product."""
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    threshold = None if threshold is None else threshold.contiguous()
    outputs, channels = weight.shape
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    loaded.was_gather_one(
        kind(),
        DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if threshold is None else threshold.data_ptr(),
        outputs,
        y.data_ptr(),
        x.numel() // channels,
        channels,
        torch.get_num_threads(),
    )
    return y


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Where the tensors are, for C++; null for None."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])

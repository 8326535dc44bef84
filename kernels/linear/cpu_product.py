"""Dense products on a CPU, in C++ (`kernels/cpu/body.inc`, `pairs.inc`), and through fp32 where there is no library."""

from collections.abc import Callable

import torch
from torch import Tensor

from was_fx.kernels.cpu.library import DTYPES, kind, library


def by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b of any number of tokens with input-major weights, summed in fp32 and rounded once.

    Args:
        x: [..., K] on the CPU; fp32, bf16 or fp16.
        weight: [N, K] of x's dtype, Wᵀ row-contiguous.
        bias: [N] or None.

    Returns:
        [..., N], x's dtype.
    """
    loaded = library()
    assert loaded is not None
    return _run(loaded.was_product, x, weight, bias)


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of a few tokens with a weight [N, K] whose rows are contiguous."""
    loaded = library()
    assert loaded is not None
    return _run(loaded.was_rows, x, weight, bias)


def _run(function: Callable[..., None], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    outputs, channels = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    function(
        kind(),
        DTYPES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // channels,
        channels,
        outputs,
        torch.get_num_threads(),
    )
    return y


# Channels that `upcast` converts at a time.
_BLOCK = 256


def upcast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of bf16 or fp16 through torch's fp32 products, a block of channels after the other."""
    rows, table = x.reshape(-1, x.shape[-1]).float(), weight.t()
    sums = x.new_zeros(rows.shape[0], table.shape[1], dtype=torch.float32)
    if bias is not None:
        sums += bias
    for begin in range(0, table.shape[0], _BLOCK):
        sums.addmm_(rows[:, begin : begin + _BLOCK], table[begin : begin + _BLOCK].float())
    return sums.to(x.dtype).view(*x.shape[:-1], -1)

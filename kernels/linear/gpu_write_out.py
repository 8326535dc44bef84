"""Wᵀ of a quantised weight written out on a GPU in one pass, for the dense products of prompts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.triton_parts import DTYPES, capable, interpreted
from was_fx.kernels.quantized.rows import QuantizedRows

ROWS, BYTES = 16, 256


@triton.jit
def _write_out(
    c_ptr,  # [K, N, padded to a multiple of 32] int8, or [K, N / 2] uint8
    s_ptr,  # fp32, [N] or [K]
    p_ptr,  # [K, N / GROUP, 2] uint8: s and z
    y_ptr,  # [K, N]
    K,
    N,
    width,  # bytes of a row of codes
    GROUP: tl.constexpr,  # 0 for int8
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    byte = (tl.program_id(1) * BYTES + tl.arange(0, BYTES))[None, :]
    n = byte // 16 * 32 + byte % 16 if GROUP else byte
    inside = (k < K) & (n < N)
    codes = tl.load(c_ptr + k * width + byte, mask=inside, other=0)
    number: tl.constexpr = y_ptr.dtype.element_ty
    if GROUP:
        pair = p_ptr + (k * (N // GROUP) + n // GROUP) * 2
        step = tl.load(pair, mask=inside, other=0).to(tl.float32) * tl.load(s_ptr + k, mask=k < K, other=0.0)
        zero = tl.load(pair + 1, mask=inside, other=0).to(tl.float32) * (1.0 / 16.0)
        low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        tl.store(y_ptr + k * N + n, (step * (low - zero)).to(number), mask=inside)
        tl.store(y_ptr + k * N + n + 16, (step * (high - zero)).to(number), mask=inside)
    else:
        scale = tl.load(s_ptr + n, mask=n < N, other=0.0)
        tl.store(y_ptr + k * N + n, (codes.to(tl.float32) * scale).to(number), mask=inside)


def supports(rows: QuantizedRows, dtype: torch.dtype) -> bool:
    """Whether this serves such a weight: on a GPU, contiguous."""
    tensors = [rows.codes, rows.scales, *([] if rows.groups is None else [rows.groups])]
    on_gpu = capable(rows.codes.device) or (interpreted() and rows.codes.is_cpu)
    return on_gpu and dtype in DTYPES and all(tensor.is_contiguous() for tensor in tensors)


def write_out(rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """Wᵀ [K, N] in a floating dtype; see `QuantizedRows.dequantize` for the meaning."""
    outputs, channels = rows.shape
    y = torch.empty(channels, outputs, dtype=dtype, device=rows.codes.device)
    width = rows.codes.shape[1]
    _write_out[(triton.cdiv(channels, ROWS), triton.cdiv(width, BYTES))](
        rows.codes,
        rows.scales,
        rows.codes if rows.groups is None else rows.groups,
        y,
        channels,
        outputs,
        width,
        GROUP=0 if rows.groups is None else outputs // rows.groups.shape[1],
        ROWS=ROWS,
        BYTES=BYTES,
        num_warps=4,
    )
    return y

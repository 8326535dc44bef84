"""Multiply by the listed rows of a quantised Wᵀ only: `torch.ops.was.gather_quantized_gemv`.

    partial[s, m, n] = Σ over the s-th part of the kept channels k of  x̃[m, k] · W[n, k]          y = Σ_s partial[s]

x̃ is x without the channels that the token m drops. As `gather_gemv`, with W in one of the formats of `QuantizedRows`:

    int8   Σ_k x̃[k] · codes[k, n], times scales[n] once, before the part is stored
    int4   Σ_k a · q − Σ_k a · z / 16,  a = x̃[k] · scales[k] · s: the second sum is one for all outputs of a group

A GPU that reads a fourth of the bytes has a fourth of the time for each weight, so codes of one token never become
floating-point numbers: their factors become integers of 16 bits, and one instruction (dp2a) multiplies two of them by
two codes and adds. With several tokens codes are converted, for the matrix units. Without a list every channel is kept.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.gemv_config import GemvConfig, gemv_config
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import note_served
from was_fx.kernels.parts.triton_parts import (
    MAX_SIBLINGS,
    begin,
    find_sibling,
    interpreted,
    launch_options,
    listed_channels,
    of_sibling,
    serves,
    share_of_list,
    slots,
)
from was_fx.kernels.quantized.rows import GROUPS, INT4, INT8, QuantizedRows

# Most tokens that share one read of the weights.
MAX_TOKENS = 8


@triton.jit
def _greater(a, b):
    """The greater of two numbers, and NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fixed_point(x):
    """x [STEPS, …] in fp32 as integers of 16 bits, and what they count [1, …], of its own for what a thread adds up.

    The largest becomes 32767, so that 2⁻¹⁶ of it is lost at most; the numbers themselves have eight to eleven bits.
    """
    peak = tl.reduce(tl.abs(x), 0, _greater, keep_dims=True)
    per = 32767.0 / tl.where(peak == 0.0, 1.0, peak)
    # 1.5 · 2²³ leaves the rounded number in the low bits.
    return (x * per + 12582912.0).to(tl.int32, bitcast=True) & 0xFFFF, peak * (1.0 / 32767.0)


@triton.jit
def _fours(steps):
    """[4 · S, F, C] as four tensors [S, F, C]: the steps 4 s, 4 s + 1, … of each."""
    shape: tl.constexpr = steps.shape
    pairs = tl.reshape(steps, [shape[0] // 4, 2, 2, shape[1], shape[2]])
    first, second = tl.split(tl.permute(pairs, [0, 3, 4, 1, 2]))
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a, b, c, d


@triton.jit
def _four_wide(a, b, c, d):
    """Four tensors [C] as one of [4 · C], in turns."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def _int8_sums(words, factors, ASSEMBLY: tl.constexpr):
    """Σ over steps of words [STEPS, F, C], four codes in each, · factors [STEPS, F, 1], 16 bits in int32.

    Returns four tensors [F, C] int32, of the first code of each word, the second, …
    """
    if not ASSEMBLY:
        signed = (factors ^ 0x8000) - 0x8000
        return (
            tl.sum((words << 24 >> 24) * signed, axis=0),
            tl.sum((words << 16 >> 24) * signed, axis=0),
            tl.sum((words << 8 >> 24) * signed, axis=0),
            tl.sum((words >> 24) * signed, axis=0),
        )
    a, b, c, d = _fours(words)
    w, x, y, z = _fours(factors)
    # Two steps lie in a register: dp2a multiplies both numbers of 16 bits by bytes and adds.
    s0, s1, s2, s3 = tl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        prmt.b32 t, $4, $5, 0x5140;
        prmt.b32 u, $4, $5, 0x7362;
        dp2a.lo.s32.s32 $0, $8, t, 0;
        dp2a.hi.s32.s32 $1, $8, t, 0;
        dp2a.lo.s32.s32 $2, $8, u, 0;
        dp2a.hi.s32.s32 $3, $8, u, 0;
        prmt.b32 t, $6, $7, 0x5140;
        prmt.b32 u, $6, $7, 0x7362;
        dp2a.lo.s32.s32 $0, $9, t, $0;
        dp2a.hi.s32.s32 $1, $9, t, $1;
        dp2a.lo.s32.s32 $2, $9, u, $2;
        dp2a.hi.s32.s32 $3, $9, u, $3;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        args=[a, b, c, d, w | (x << 16), y | (z << 16)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return tl.sum(s0, axis=0), tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)


@triton.jit
def _int4_sums(words, factors, ASSEMBLY: tl.constexpr):
    """As `_int8_sums` of words of eight codes; the last four tensors are of the high four bits, times 16."""
    if not ASSEMBLY:
        signed = (factors ^ 0x8000) - 0x8000
        return (
            tl.sum((words & 0x0F) * signed, axis=0),
            tl.sum((words >> 8 & 0x0F) * signed, axis=0),
            tl.sum((words >> 16 & 0x0F) * signed, axis=0),
            tl.sum((words >> 24 & 0x0F) * signed, axis=0),
            tl.sum((words & 0xF0) * signed, axis=0),
            tl.sum((words >> 8 & 0xF0) * signed, axis=0),
            tl.sum((words >> 16 & 0xF0) * signed, axis=0),
            tl.sum((words >> 24 & 0xF0) * signed, axis=0),
        )
    a, b, c, d = _fours(words)
    w, x, y, z = _fours(factors)
    s0, s1, s2, s3, s4, s5, s6, s7 = tl.inline_asm_elementwise(
        """{
        .reg .b32 t, u, v;
        prmt.b32 t, $8, $9, 0x5140;
        prmt.b32 u, $8, $9, 0x7362;
        and.b32 v, t, 0x0F0F0F0F;
        dp2a.lo.s32.u32 $0, $12, v, 0;
        dp2a.hi.s32.u32 $1, $12, v, 0;
        and.b32 v, u, 0x0F0F0F0F;
        dp2a.lo.s32.u32 $2, $12, v, 0;
        dp2a.hi.s32.u32 $3, $12, v, 0;
        and.b32 v, t, 0xF0F0F0F0;
        dp2a.lo.s32.u32 $4, $12, v, 0;
        dp2a.hi.s32.u32 $5, $12, v, 0;
        and.b32 v, u, 0xF0F0F0F0;
        dp2a.lo.s32.u32 $6, $12, v, 0;
        dp2a.hi.s32.u32 $7, $12, v, 0;
        prmt.b32 t, $10, $11, 0x5140;
        prmt.b32 u, $10, $11, 0x7362;
        and.b32 v, t, 0x0F0F0F0F;
        dp2a.lo.s32.u32 $0, $13, v, $0;
        dp2a.hi.s32.u32 $1, $13, v, $1;
        and.b32 v, u, 0x0F0F0F0F;
        dp2a.lo.s32.u32 $2, $13, v, $2;
        dp2a.hi.s32.u32 $3, $13, v, $3;
        and.b32 v, t, 0xF0F0F0F0;
        dp2a.lo.s32.u32 $4, $13, v, $4;
        dp2a.hi.s32.u32 $5, $13, v, $5;
        and.b32 v, u, 0xF0F0F0F0;
        dp2a.lo.s32.u32 $6, $13, v, $6;
        dp2a.hi.s32.u32 $7, $13, v, $7;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        args=[a, b, c, d, w | (x << 16), y | (z << 16)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return (
        tl.sum(s0, axis=0),
        tl.sum(s1, axis=0),
        tl.sum(s2, axis=0),
        tl.sum(s3, axis=0),
        tl.sum(s4, axis=0),
        tl.sum(s5, axis=0),
        tl.sum(s6, axis=0),
        tl.sum(s7, axis=0),
    )


@triton.jit
def _rows_of(ptr, k, row, last, columns, width, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, columns] of the listed channels k, as far as `last`; zeros beyond."""
    entries = (k.to(tl.int64) if WIDE else k)[:, None] * width + columns[None, :]
    listed = row + tl.arange(0, ROWS) < last
    return tl.load(ptr + entries, mask=listed[:, None] & (columns < width)[None, :], other=0)


@triton.jit
def _gather_int8(
    x_ptr,  # [K]
    index_ptr,  # [G, T, SEGMENT]; None with the next: every channel
    count_ptr,  # [G, T]
    c0,  # [K, N_g / 4, padded to a multiple of 8] int32 each, four codes in each word
    c1,
    c2,
    c3,
    s0,  # [N_g] fp32 each
    s1,
    s2,
    s3,
    expert_ptr,  # [P] of P pairs of a row and an expert
    partial_ptr,  # [S, ΣN]; of pairs [S, P, N]
    K,
    T,
    N0,
    N1,
    N2,
    N3,
    PER,  # experts of a row
    G: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a code's offset needs 64 bits
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
    EXPERTS: tl.constexpr = False,  # as for `gather_kernel`: each weight is one of E
):
    STEPS: tl.constexpr = ROWS // FOLDED
    WORDS: tl.constexpr = COLUMNS // 4
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    c_ptr = of_sibling(g, c0, c1, c2, c3)
    if ALIGNED:
        c_ptr = tl.multiple_of(c_ptr, 16)
    width = tl.multiple_of(tl.cdiv(n, 32) * 8, 8)
    words = tile * WORDS + tl.arange(0, WORDS)
    begin(PDL)
    s_ptr = of_sibling(g, s0, s1, s2, s3)
    chosen = tl.program_id(2)
    if EXPERTS:
        # One of another rank has an empty list, so nothing of it is read.
        expert = tl.load(expert_ptr + chosen).to(tl.int64)
        c_ptr += expert * K * width
        if ALIGNED:
            c_ptr = tl.multiple_of(c_ptr, 16)
        s_ptr += expert * n
        x_ptr += (chosen // PER) * K
    if index_ptr is not None:
        count_ptr += (g + chosen) * T
        index_ptr += (g + chosen) * T * SEGMENT
    counts, ends, first, last = share_of_list(count_ptr, T, K, split, splits, SEGMENTS)
    a = tl.zeros([FOLDED, WORDS], tl.float32)
    b, c, d = tl.zeros_like(a), tl.zeros_like(a), tl.zeros_like(a)
    k, x = listed_channels(x_ptr, index_ptr, x_ptr, counts, ends, first, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS)
    for row in tl.range(first, last, ROWS):
        codes = _rows_of(c_ptr, k, row, last, words, width, ROWS, WIDE)
        # The channels of the next step are looked up while this step's codes arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, x_ptr, counts, ends, row + ROWS, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS
        )
        factors, unit = _fixed_point(tl.reshape(x[:, None], [STEPS, FOLDED, 1]))
        unit = tl.reshape(unit, [FOLDED, 1])
        first_codes, second, third, fourth = _int8_sums(tl.reshape(codes, [STEPS, FOLDED, WORDS]), factors, ASSEMBLY)
        a += first_codes.to(tl.float32) * unit
        b += second.to(tl.float32) * unit
        c += third.to(tl.float32) * unit
        d += fourth.to(tl.float32) * unit
        k, x = k_next, x_next
    sums = _four_wide(tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.sum(d, axis=0))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    scales = tl.load(s_ptr + columns, mask=columns < tl.where(last > first, n, 0), other=0.0)
    place = (split * tl.num_programs(2) + chosen) * (N0 + N1 + N2 + N3) + start + columns
    tl.store(partial_ptr + place, sums * scales, mask=columns < n)


@triton.jit
def _gather_int4(
    x_ptr,  # [K]
    index_ptr,  # [G, T, SEGMENT]; None with the next: every channel
    count_ptr,  # [G, T]
    c0,  # [K, N_g / 8] int32 each, eight codes in each word
    c1,
    c2,
    c3,
    s0,  # [K] fp32 each
    s1,
    s2,
    s3,
    p0,  # [K, N_g / GROUP] int16 each: s and z, the latter in the high byte
    p1,
    p2,
    p3,
    expert_ptr,  # [P] of P pairs of a row and an expert
    partial_ptr,  # [S, ΣN]; of pairs [S, P, N]
    K,
    T,
    N0,
    N1,
    N2,
    N3,
    PER,  # experts of a row
    G: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a code's offset needs 64 bits
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
    EXPERTS: tl.constexpr = False,  # as for `gather_kernel`: each weight is one of E
):
    BLOCKS: tl.constexpr = COLUMNS // 32  # a block is 32 outputs in four words, which lie in one group
    STEPS: tl.constexpr = ROWS // FOLDED
    WORDS: tl.constexpr = COLUMNS // 8
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    c_ptr = of_sibling(g, c0, c1, c2, c3)
    s_ptr = of_sibling(g, s0, s1, s2, s3)
    p_ptr = of_sibling(g, p0, p1, p2, p3)
    if ALIGNED:
        c_ptr = tl.multiple_of(c_ptr, 16)
    width = tl.multiple_of(n // 32 * 4, 4)
    words = tile * WORDS + tl.arange(0, WORDS)
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    pairs = blocks // (GROUP // 32)
    begin(PDL)
    chosen = tl.program_id(2)
    if EXPERTS:
        # One of another rank has an empty list, so nothing of it is read.
        expert = tl.load(expert_ptr + chosen).to(tl.int64)
        c_ptr += expert * K * width
        if ALIGNED:
            c_ptr = tl.multiple_of(c_ptr, 16)
        s_ptr += expert * K
        p_ptr += expert * K * (n // GROUP)
        x_ptr += (chosen // PER) * K
    if index_ptr is not None:
        count_ptr += (g + chosen) * T
        index_ptr += (g + chosen) * T * SEGMENT
    counts, ends, first, last = share_of_list(count_ptr, T, K, split, splits, SEGMENTS)
    zeros = tl.zeros([FOLDED, BLOCKS], tl.float32)
    low_a = tl.zeros([FOLDED, BLOCKS, 4], tl.float32)
    low_b, low_c, low_d = tl.zeros_like(low_a), tl.zeros_like(low_a), tl.zeros_like(low_a)
    high_a, high_b, high_c, high_d = low_b, low_b, low_b, low_b
    k, x = listed_channels(x_ptr, index_ptr, x_ptr, counts, ends, first, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS)
    for row in tl.range(first, last, ROWS):
        codes = _rows_of(c_ptr, k, row, last, words, width, ROWS, WIDE)
        pair = _rows_of(p_ptr, k, row, last, pairs, n // GROUP, ROWS, WIDE)
        x *= tl.load(s_ptr + k)
        # The channels of the next step are looked up while this step's codes arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, x_ptr, counts, ends, row + ROWS, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS
        )
        pair = pair.to(tl.int32)
        step = (pair & 0xFF).to(tl.float32) * x[:, None]
        zero = ((pair >> 8) & 0xFF).to(tl.float32) * (1.0 / 16.0)
        zeros += tl.sum(tl.reshape(step * zero, [STEPS, FOLDED, BLOCKS]), axis=0)
        factors, unit = _fixed_point(tl.reshape(step, [STEPS, FOLDED, BLOCKS]))
        factors = tl.broadcast_to(factors[:, :, :, None], [STEPS, FOLDED, BLOCKS, 4])
        unit = tl.reshape(unit, [FOLDED, BLOCKS, 1])
        l0, l1, l2, l3, h0, h1, h2, h3 = _int4_sums(
            tl.reshape(codes, [STEPS, FOLDED, WORDS]), tl.reshape(factors, [STEPS, FOLDED, WORDS]), ASSEMBLY
        )
        low_a += tl.reshape(l0.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        low_b += tl.reshape(l1.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        low_c += tl.reshape(l2.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        low_d += tl.reshape(l3.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        high_a += tl.reshape(h0.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        high_b += tl.reshape(h1.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        high_c += tl.reshape(h2.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        high_d += tl.reshape(h3.to(tl.float32), [FOLDED, BLOCKS, 4]) * unit
        k, x = k_next, x_next
    zeros = tl.sum(zeros, axis=0)
    place = partial_ptr + (split * tl.num_programs(2) + chosen) * (N0 + N1 + N2 + N3) + start
    _store_int4(
        place, tile, n, _block_sums(low_a), _block_sums(low_b), _block_sums(low_c), _block_sums(low_d), zeros, 1.0
    )
    _store_int4(
        place + 16,
        tile,
        n,
        _block_sums(high_a),
        _block_sums(high_b),
        _block_sums(high_c),
        _block_sums(high_d),
        zeros,
        1.0 / 16.0,
    )


@triton.jit
def _block_sums(sums):
    """Σ over [FOLDED, BLOCKS, 4] as [BLOCKS · 4]."""
    total = tl.sum(sums, axis=0)
    return tl.reshape(total, [total.shape[0] * 4])


@triton.jit
def _store_int4(ptr, tile, n, a, b, c, d, zeros, unit):
    """Write sixteen of the 32 outputs of each block: the sums of bytes 4 i, 4 i + 1, … times `unit`, less the zeros."""
    BLOCKS: tl.constexpr = zeros.shape[0]
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    sums = tl.reshape(_four_wide(a, b, c, d), [BLOCKS, 16]) * unit - zeros[:, None]
    tl.store(ptr + blocks[:, None] * 32 + tl.arange(0, 16)[None, :], sums, mask=(blocks * 32 < n)[:, None])


@triton.jit
def _gather_many(
    x_ptr,  # [M, K]
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    c0,  # [K, N_g, padded to a multiple of 32] int8 each, or [K, N_g / 2] uint8
    c1,
    c2,
    c3,
    s0,  # fp32 each, [N_g] or [K]
    s1,
    s2,
    s3,
    p0,  # [K, N_g / GROUP] int16 each: s and z, the latter in the high byte
    p1,
    p2,
    p3,
    t0,  # [K] fp32 each
    t1,
    t2,
    t3,
    partial_ptr,  # [S, M, ΣN]
    M,
    K,
    T,
    N0,
    N1,
    N2,
    N3,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # 0 for int8
    TOKENS: tl.constexpr,  # M, as a power of two from 16
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a code's offset needs 64 bits
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    BYTES: tl.constexpr = COLUMNS // 2 if GROUP else COLUMNS
    number: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    c_ptr = of_sibling(g, c0, c1, c2, c3)
    s_ptr = of_sibling(g, s0, s1, s2, s3)
    p_ptr = of_sibling(g, p0, p1, p2, p3)
    t_ptr = of_sibling(g, t0, t1, t2, t3)
    if ALIGNED:
        c_ptr = tl.multiple_of(c_ptr, 16)
    width = tl.multiple_of(n // 32 * 16 if GROUP else tl.cdiv(n, 32) * 32, 16)
    byte = tile * BYTES + tl.arange(0, BYTES)
    begin(PDL)
    counts, ends, first, last = share_of_list(count_ptr + g * T, T, K, split, splits, SEGMENTS)
    index_ptr += g * T * SEGMENT
    tokens = tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS, BYTES], tl.float32)
    high_sums = tl.zeros([TOKENS, BYTES], tl.float32)
    k, x = listed_channels(
        x_ptr, index_ptr, t_ptr, counts, ends, first, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
    )
    for row in tl.range(first, last, ROWS):
        codes = _rows_of(c_ptr, k, row, last, byte, width, ROWS, WIDE)
        if GROUP:
            pair = _rows_of(p_ptr, k, row, last, byte * 2 // GROUP, n // GROUP, ROWS, WIDE).to(tl.int32)
            step = (pair & 0xFF).to(tl.float32) * tl.load(s_ptr + k)[:, None]
            zero = ((pair >> 8) & 0xFF).to(tl.float32) * (1.0 / 16.0)
        # The channels of the next step are looked up while this step's codes arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, t_ptr, counts, ends, row + ROWS, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
        )
        if GROUP:
            low = (((codes & 15).to(tl.float32) - zero) * step).to(number)
            high = (((codes >> 4).to(tl.float32) - zero) * step).to(number)
            sums += tl.dot(x.to(number), low, input_precision="ieee")
            high_sums += tl.dot(x.to(number), high, input_precision="ieee")
        else:
            sums += tl.dot(x.to(number), codes.to(number), input_precision="ieee")
        k, x = k_next, x_next
    columns = byte // 16 * 32 + byte % 16 if GROUP else byte
    place = partial_ptr + (split * M + tokens[:, None]) * (N0 + N1 + N2 + N3) + start + columns[None, :]
    inside = (tokens < M)[:, None] & (columns < n)[None, :]
    if GROUP:
        tl.store(place, sums, mask=inside)
        tl.store(place + 16, high_sums, mask=inside)
    else:
        tl.store(place, sums * tl.load(s_ptr + columns, mask=columns < n, other=0.0)[None, :], mask=inside)


def weight_format(groups: Sequence[Tensor]) -> str:
    """ "int4" where the weights have groups, else "int8"."""
    return INT4 if groups else INT8


def supports(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and such weights: few tokens on a GPU, rows contiguous, groups of one size."""
    if not serves(x) or not x.numel() or x.numel() // x.shape[-1] > MAX_TOKENS:
        return False
    if not all(tensor.is_contiguous() and tensor.device == x.device for tensor in (*codes, *scales, *groups)):
        return False
    if any(c.storage_offset() % 4 for c in codes):
        return False
    if not groups:
        return all(c.dtype == torch.int8 and c.shape[1] % 32 == 0 for c in codes)
    if not all(tensor.dtype == torch.uint8 for tensor in (*codes, *groups)):
        return False
    sizes = {2 * c.shape[1] / p.shape[1] for c, p in zip(codes, groups, strict=True)}
    return len(sizes) == 1 and sizes <= set(GROUPS) and all(p.storage_offset() % 2 == 0 for p in groups)


def reference(
    x: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
) -> Tensor:
    """The op's meaning in plain PyTorch.

    Args:
        x: [..., K], M tokens.
        index, count: the kept channels, as `compact` lists them; None: every channel of one token.
        codes, scales, groups: of G weights of one format, as `QuantizedRows` holds them; no groups for int8.
        thresholds: G tensors [K] fp32, read when M > 1.
        splits: S.

    Returns:
        [S, M, ΣN_g] fp32.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    parts = []
    for g in range(len(codes)):
        weight = QuantizedRows(codes[g], scales[g], groups[g] if groups else None)
        kept = torch.arange(x.shape[-1], device=x.device)
        if index is not None and count is not None:
            ranks = torch.arange(index.shape[2], device=x.device) < count[g][:, None]
            kept = index[g][ranks].long()
        values = rows[:, kept]
        if len(rows) > 1:
            values = values.masked_fill(values.abs() <= thresholds[g][kept], 0)
        listed = weight.dequantize(torch.float32, kept)
        cuts = [len(kept) * s // splits for s in range(splits + 1)]
        parts.append(torch.stack([values[:, a:b] @ listed[a:b] for a, b in itertools.pairwise(cuts)]))
    return torch.cat(parts, dim=-1)


def output_sizes(codes: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[Tensor]) -> list[int]:
    """N of each weight."""
    return [2 * c.shape[1] for c in codes] if groups else [s.shape[0] for s in scales]


def gather_quantized_gemv(
    x: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
    config: GemvConfig | None = None,
) -> Tensor:
    """See `reference`; by Triton where it serves. `config` overrides the tuned one."""
    if not supports(x, codes, scales, groups):
        note_served(codes, "gather_quantized_gemv_reference", "a GPU's kernels don't run here")
        return reference(x, index, count, codes, scales, groups, thresholds, splits)
    note_served(codes, "gather_quantized_gemv", "one token on a GPU, kept channels listed by the kernel before")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    sizes = output_sizes(codes, scales, groups)
    config = config or gemv_config(x.device, weight_format(groups), x.shape[-1], sizes)
    partial = x.new_empty((splits, rows.shape[0], sum(sizes)), dtype=torch.float32)
    if rows.shape[0] == 1:
        launch_one(rows, index, count, codes, scales, groups, sizes, partial, config)
        return partial
    assert index is not None
    columns = max(config.columns, 32) if groups else config.columns
    _gather_many[(sum(triton.cdiv(n, columns) for n in sizes), splits)](
        rows,
        index,
        count,
        *slots(codes),
        *slots(scales),
        *slots([p.view(torch.int16) for p in groups] or [None]),
        *slots(thresholds),
        partial,
        rows.shape[0],
        rows.shape[1],
        index.shape[1],
        *sizes,
        *[0] * (MAX_SIBLINGS - len(sizes)),
        GROUP=sizes[0] // groups[0].shape[1] if groups else 0,
        TOKENS=16,
        ROWS=max(16, min(config.rows, 32)),
        UPCAST=interpreted(),
        **_meta(x, index, codes, sizes, columns, config),
    )
    return partial


def launch_one(
    rows: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    sizes: Sequence[int],
    partial: Tensor,
    config: GemvConfig,
    experts: Tensor | None = None,
) -> None:
    """Multiply one token, or one row for each pair of a row and an expert, and write `partial` [S, P, ΣN].

    Args:
        rows: [1, K]; with experts [R, K].
        index, count: the lists of G siblings, or of P pairs; None: every channel.
        codes, scales, groups: as for `reference`; with experts one of each, of E matrices.
        sizes: N of each sibling.
        partial: fp32.
        config: tile sizes.
        experts: [P], P a multiple of R.
    """
    pairs, segments = (1, 1) if index is None else index.shape[:2]
    columns = max(config.columns, 32) if groups else config.columns
    tile_rows, row_bytes = max(4, config.rows), columns // 2 if groups else columns
    meta = {
        **_meta(rows, index, codes, sizes, columns, config),
        "ROWS": tile_rows,
        # The rows that all threads read at once, 16 bytes each; each thread multiplies by four at once.
        "FOLDED": min(tile_rows // 4, max(1, 512 * config.warps // row_bytes)),
        "ASSEMBLY": rows.is_cuda and not torch.version.hip,
        "EXPERTS": experts is not None,
    }
    tiles, per = sum(triton.cdiv(n, columns) for n in sizes), pairs // len(rows)
    grid = (tiles, partial.shape[0], 1 if experts is None else pairs)
    words = slots([c.view(torch.int32) for c in codes])
    last = (experts, partial, rows.shape[1], segments, *sizes, *[0] * (MAX_SIBLINGS - len(sizes)), per)
    if groups:
        words_of_groups = slots([p.view(torch.int16) for p in groups])
        group = sizes[0] // groups[0].shape[-2]
        _gather_int4[grid](rows, index, count, *words, *slots(scales), *words_of_groups, *last, GROUP=group, **meta)
    else:
        _gather_int8[grid](rows, index, count, *words, *slots(scales), *last, **meta)


def _meta(
    x: Tensor, index: Tensor | None, codes: Sequence[Tensor], sizes: Sequence[int], columns: int, config: GemvConfig
) -> dict[str, Any]:
    """What all kernels are specialised by."""
    segments, segment = (1, 1) if index is None else index.shape[1:]
    return {
        "G": len(sizes),
        "SEGMENT": segment,
        "SEGMENTS": triton.next_power_of_2(segments),
        "COLUMNS": columns,
        "ALIGNED": all(c.data_ptr() % 16 == 0 for c in codes),
        "WIDE": max(c.shape[-2] * c.shape[-1] for c in codes) >= 2**31,
        "num_warps": config.warps,
        **launch_options(x),
    }


def fake(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
) -> Tensor:
    """What the op returns, uninitialised."""
    tokens = x.numel() // x.shape[-1]
    return x.new_empty((splits, tokens, sum(output_sizes(codes, scales, groups))), dtype=torch.float32)


gather_quantized_gemv_op = register_op(
    "gather_quantized_gemv(Tensor x, Tensor index, Tensor count, Tensor[] codes, Tensor[] scales, Tensor[] groups, "
    "Tensor[] thresholds, int splits) -> Tensor",
    lambda x, index, count, codes, scales, groups, thresholds, splits: gather_quantized_gemv(
        x, index, count, codes, scales, groups, thresholds, splits
    ),
    fake,
)

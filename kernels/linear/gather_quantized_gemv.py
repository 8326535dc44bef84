"""Multiply by the listed rows of a quantised Wᵀ only: `torch.ops.was.gather_quantized_gemv`.

    partial[s, m, n] = Σ over the s-th part of the kept channels k of  x̃[m, k] · W[n, k]          y = Σ_s partial[s]

As `gather_gemv`, with W in one of the formats of `QuantizedRows`. Codes become numbers in registers, with as few
instructions as there are ways: a GPU that reads a fourth of the bytes has a fourth of the time for each weight.

    int8   Σ_k x̃[k] · codes[k, n], times scales[n] once, before the part is stored
    int4   Σ_k a · q − Σ_k a · z / 16,  a = x̃[k] · scales[k] · s: the second sum is one for all outputs of a group
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import MAX_TOKENS
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

# How codes become fp32.
CAST, MAGIC, ASSEMBLY = 0, 1, 2


@triton.jit
def _int8_to_fp32(codes, CONVERT: tl.constexpr):
    """codes, int8, as fp32."""
    if CONVERT == 0:
        return codes.to(tl.float32)
    if CONVERT == 1:
        # The low byte of 2²³ counts in ones.
        biased = ((codes.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000
        return biased.to(tl.float32, bitcast=True) - 8388736.0
    biased = tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 $0, t, 0x4B000000, 0x7540;
        prmt.b32 $1, t, 0x4B000000, 0x7541;
        prmt.b32 $2, t, 0x4B000000, 0x7542;
        prmt.b32 $3, t, 0x4B000000, 0x7543;
        }""",
        "=r,=r,=r,=r,r",
        args=[codes],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
    return biased.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _int4_to_fp32(codes, CONVERT: tl.constexpr):
    """1 + q / 16 in fp32, of the low and of the high four bits of codes, uint8."""
    if CONVERT == 0:
        low = (codes & 15).to(tl.float32)
        high = (codes >> 4).to(tl.float32)
        return 1.0 + low / 16.0, 1.0 + high / 16.0
    if CONVERT == 1:
        # The highest four bits of the fraction of 1.0.
        bits = codes.to(tl.int32)
        low = ((bits & 0x0F) << 19) | 0x3F800000
        high = ((bits & 0xF0) << 15) | 0x3F800000
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            shl.b32 t, $8, 3;
            shr.b32 u, $8, 1;
            lop3.b32 t, t, 0x78787878, 0x80808080, 0xEA;
            lop3.b32 u, u, 0x78787878, 0x80808080, 0xEA;
            prmt.b32 $0, t, 0x3F000000, 0x7044;
            prmt.b32 $1, t, 0x3F000000, 0x7144;
            prmt.b32 $2, t, 0x3F000000, 0x7244;
            prmt.b32 $3, t, 0x3F000000, 0x7344;
            prmt.b32 $4, u, 0x3F000000, 0x7044;
            prmt.b32 $5, u, 0x3F000000, 0x7144;
            prmt.b32 $6, u, 0x3F000000, 0x7244;
            prmt.b32 $7, u, 0x3F000000, 0x7344;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            args=[codes],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _gather_int8(
    x_ptr,  # [M, K]
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    c0,  # [K, N_g, padded to a multiple of 32] int8 each
    c1,
    c2,
    c3,
    s0,  # [N_g] fp32 each
    s1,
    s2,
    s3,
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
    TOKENS: tl.constexpr,  # 1, or the next power of two from 16
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a code's offset needs 64 bits
    UPCAST: tl.constexpr,
    CONVERT: tl.constexpr,
    PDL: tl.constexpr,
):
    STEPS: tl.constexpr = ROWS // FOLDED
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    c_ptr = of_sibling(g, c0, c1, c2, c3)
    t_ptr = of_sibling(g, t0, t1, t2, t3)
    if ALIGNED:
        c_ptr = tl.multiple_of(c_ptr, 16)
    width = tl.multiple_of(tl.cdiv(n, 32) * 32, 32)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    begin(PDL)
    counts, ends, first, last = share_of_list(count_ptr + g * T, T, split, splits, SEGMENTS)
    index_ptr += g * T * SEGMENT
    tokens = tl.arange(0, TOKENS)
    sums = tl.zeros([FOLDED if TOKENS == 1 else TOKENS, COLUMNS], tl.float32)
    k, x = listed_channels(
        x_ptr, index_ptr, t_ptr, counts, ends, first, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
    )
    for row in tl.range(first, last, ROWS):
        entries = (k.to(tl.int64) if WIDE else k)[:, None] * width + columns[None, :]
        listed = row + tl.arange(0, ROWS) < last
        codes = tl.load(
            c_ptr + entries, mask=listed[:, None] & (columns < width)[None, :], other=0, eviction_policy="evict_first"
        )
        # The channels of the next step are looked up while this step's codes arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, t_ptr, counts, ends, row + ROWS, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
        )
        if TOKENS == 1:
            products = x[:, None] * _int8_to_fp32(codes, CONVERT)
            sums += tl.sum(tl.reshape(products, STEPS, FOLDED, COLUMNS), axis=0)
        elif UPCAST:
            sums += tl.dot(x, codes.to(tl.float32), input_precision="ieee")
        else:
            number = x_ptr.dtype.element_ty
            sums += tl.dot(x.to(number), codes.to(number), input_precision="ieee")
        k, x = k_next, x_next
    in_columns = columns < n
    scales = tl.load(of_sibling(g, s0, s1, s2, s3) + columns, mask=in_columns, other=0.0)
    total = N0 + N1 + N2 + N3
    if TOKENS == 1:
        tl.store(partial_ptr + split * total + start + columns, tl.sum(sums, axis=0) * scales, mask=in_columns)
    else:
        place = (split * M + tokens[:, None]) * total + start + columns[None, :]
        tl.store(partial_ptr + place, sums * scales[None, :], mask=(tokens < M)[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize_on_alignment=["p0", "p1", "p2", "p3"])
def _gather_int4(
    x_ptr,  # [M, K]
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    c0,  # [K, N_g / 2] uint8 each
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
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,  # 1, or the next power of two from 16
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # a code's offset needs 64 bits
    UPCAST: tl.constexpr,
    CONVERT: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCKS: tl.constexpr = COLUMNS // 32
    STEPS: tl.constexpr = ROWS // FOLDED
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    c_ptr = of_sibling(g, c0, c1, c2, c3)
    s_ptr = of_sibling(g, s0, s1, s2, s3)
    p_ptr = of_sibling(g, p0, p1, p2, p3)
    t_ptr = of_sibling(g, t0, t1, t2, t3)
    if ALIGNED:
        c_ptr = tl.multiple_of(c_ptr, 16)
    width = tl.multiple_of(n // 32 * 16, 16)
    # A block is 32 outputs in sixteen bytes, which lie in one group.
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    in_blocks = blocks * 32 < n
    pairs = blocks // (GROUP // 32)
    byte = tl.arange(0, 16)
    half = tile * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    begin(PDL)
    counts, ends, first, last = share_of_list(count_ptr + g * T, T, split, splits, SEGMENTS)
    index_ptr += g * T * SEGMENT
    tokens = tl.arange(0, TOKENS)
    if TOKENS == 1:
        low_sums = tl.zeros([FOLDED, BLOCKS, 16], tl.float32)
        zero_sums = tl.zeros([FOLDED, BLOCKS], tl.float32)
    else:
        low_sums = tl.zeros([TOKENS, BLOCKS * 16], tl.float32)
    high_sums = tl.zeros_like(low_sums)
    k, x = listed_channels(
        x_ptr, index_ptr, t_ptr, counts, ends, first, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
    )
    for row in tl.range(first, last, ROWS):
        listed = row + tl.arange(0, ROWS) < last
        at = k.to(tl.int64) if WIDE else k
        entries = at[:, None] * width + half[None, :]
        inside = listed[:, None] & (half < width)[None, :]
        codes = tl.load(c_ptr + entries, mask=inside, other=0, eviction_policy="evict_first")
        codes = tl.reshape(codes, ROWS, BLOCKS, 16)
        inside = listed[:, None] & in_blocks[None, :]
        pair = tl.load(p_ptr + at[:, None] * (n // GROUP) + pairs[None, :], mask=inside, other=0).to(tl.int32)
        scale = tl.load(s_ptr + k, mask=listed, other=0.0)
        # The channels of the next step are looked up while this step's codes arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, t_ptr, counts, ends, row + ROWS, last, tokens, M, K, TOKENS, SEGMENT, SEGMENTS, ROWS
        )
        low, high = _int4_to_fp32(codes, CONVERT)
        # q / 16 + 1 - zero = (q - z / 16) / 16
        zero = ((pair >> 8) & 0xFF).to(tl.float32) * (1.0 / 256.0) + 1.0
        step = (pair & 0xFF).to(tl.float32)
        if TOKENS == 1:
            step *= (x * scale * 16.0)[:, None]
            zero_sums += tl.sum(tl.reshape(step * zero, STEPS, FOLDED, BLOCKS), axis=0)
            low_sums += tl.sum(tl.reshape(step[:, :, None] * low, STEPS, FOLDED, BLOCKS, 16), axis=0)
            high_sums += tl.sum(tl.reshape(step[:, :, None] * high, STEPS, FOLDED, BLOCKS, 16), axis=0)
        else:
            step *= (scale * 16.0)[:, None]
            low = tl.reshape(step[:, :, None] * (low - zero[:, :, None]), [ROWS, BLOCKS * 16])
            high = tl.reshape(step[:, :, None] * (high - zero[:, :, None]), [ROWS, BLOCKS * 16])
            if not UPCAST:
                number = x_ptr.dtype.element_ty
                x, low, high = x.to(number), low.to(number), high.to(number)
            low_sums += tl.dot(x, low, input_precision="ieee")
            high_sums += tl.dot(x, high, input_precision="ieee")
        k, x = k_next, x_next
    total = N0 + N1 + N2 + N3
    if TOKENS == 1:
        zeros = tl.sum(zero_sums, axis=0)[:, None]
        place = partial_ptr + split * total + start + blocks[:, None] * 32 + byte[None, :]
        tl.store(place, tl.sum(low_sums, axis=0) - zeros, mask=in_blocks[:, None])
        tl.store(place + 16, tl.sum(high_sums, axis=0) - zeros, mask=in_blocks[:, None])
    else:
        columns = half // 16 * 32 + half % 16
        place = partial_ptr + (split * M + tokens[:, None]) * total + start + columns[None, :]
        inside = (tokens < M)[:, None] & (columns < n)[None, :]
        tl.store(place, low_sums, mask=inside)
        tl.store(place + 16, high_sums, mask=inside)


def weight_format(groups: Sequence[Tensor]) -> str:
    """ "int4" where the weights have groups, else "int8"."""
    return INT4 if groups else INT8


def supports(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and such weights: few tokens on a GPU, rows contiguous, groups of one size."""
    if not serves(x) or not x.numel() or x.numel() // x.shape[-1] > MAX_TOKENS:
        return False
    if not all(tensor.is_contiguous() and tensor.device == x.device for tensor in (*codes, *scales, *groups)):
        return False
    if not groups:
        return all(c.dtype == torch.int8 and c.shape[1] % 32 == 0 for c in codes)
    if not all(tensor.dtype == torch.uint8 for tensor in (*codes, *groups)):
        return False
    sizes = {2 * c.shape[1] / p.shape[1] for c, p in zip(codes, groups, strict=True)}
    return len(sizes) == 1 and sizes <= set(GROUPS) and all(p.storage_offset() % 2 == 0 for p in groups)


def reference(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
) -> Tensor:
    """The op's meaning in plain PyTorch.

    Args:
        x: [..., K], M tokens.
        index, count: the kept channels, as `compact` lists them.
        codes, scales, groups: of G weights of one format, as `QuantizedRows` holds them; no groups for int8.
        thresholds: G tensors [K] fp32, read when M > 1.
        splits: S.

    Returns:
        [S, M, ΣN_g] fp32.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    parts = []
    for g, threshold in enumerate(thresholds):
        weight = QuantizedRows(codes[g], scales[g], groups[g] if groups else None)
        ranks = torch.arange(index.shape[2], device=x.device) < count[g][:, None]
        kept = index[g][ranks].long()
        values = rows[:, kept]
        if len(rows) > 1:
            values = values.masked_fill(values.abs() <= threshold[kept], 0)
        listed = weight.dequantize(torch.float32, kept)
        cuts = [len(kept) * s // splits for s in range(splits + 1)]
        parts.append(torch.stack([values[:, a:b] @ listed[a:b] for a, b in itertools.pairwise(cuts)]))
    return torch.cat(parts, dim=-1)


def output_sizes(codes: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[Tensor]) -> list[int]:
    """N of each weight."""
    return [2 * c.shape[1] for c in codes] if groups else [s.shape[0] for s in scales]


def gather_quantized_gemv(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
    config: GemvConfig | None = None,
    convert: int = ASSEMBLY,
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
    _, segments, segment = index.shape
    one = rows.shape[0] == 1
    columns = max(config.columns, 32) if groups else config.columns
    row_bytes = columns // 2 if groups else columns
    tile_rows = config.rows if one else max(16, min(config.rows, 32))
    meta = {
        "G": len(sizes),
        "TOKENS": 1 if one else 16,
        "SEGMENT": segment,
        "SEGMENTS": triton.next_power_of_2(segments),
        "ROWS": tile_rows,
        "COLUMNS": columns,
        # The rows that all threads read at once, 16 bytes each.
        "FOLDED": min(tile_rows, max(1, 512 * config.warps // row_bytes)),
        "ALIGNED": all(c.data_ptr() % 16 == 0 for c in codes),
        "WIDE": max(c.numel() for c in codes) >= 2**31,
        "UPCAST": interpreted(),
        "CONVERT": min(convert, MAGIC) if interpreted() else convert,
        "num_warps": config.warps,
        **launch_options(x),
    }
    grid = (sum(triton.cdiv(n, columns) for n in sizes), splits)
    lists = (rows, index, count)
    weights = (*slots(codes), *slots(scales))
    drops = (*slots(thresholds if not one else [None] * len(sizes)), partial, rows.shape[0], rows.shape[1], segments)
    outputs = (*sizes, *[0] * (MAX_SIBLINGS - len(sizes)))
    if groups:
        pairs = [p.view(torch.int16) for p in groups]
        _gather_int4[grid](
            *lists, *weights, *slots(pairs), *drops, *outputs, GROUP=sizes[0] // groups[0].shape[1], **meta
        )
    else:
        _gather_int8[grid](*lists, *weights, *drops, *outputs, **meta)
    return partial


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

"""Attention of one new token over a cache, which skips what the mask hides: `torch.ops.was.decode_attention`.

    y[h] = Σ_l softmax_l(scale · q[h] · k[h // group, l] where mask[l]) v[h // group, l]      h < H, l < L

A static cache is as long as it may ever get; the mask says which entries exist. A block of keys that is wholly masked
is not read, so a step costs what the used part of the cache costs. Keys are shared by `group` query heads without a
copy. With thresholds, y is also listed for the next Linears: see `compact`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import compact
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, interpreted, launch_options, list_kept, serves, slots

# Keys per step of a program.
BLOCK = 64
# Programs that all heads of a sequence share; each key-value head gets an equal number of them.
PROGRAMS = 128
# Channels per segment of the list, and per program that adds up the parts of some heads.
SEGMENT = 128


@triton.jit
def _attend(
    q_ptr,  # [B, H, D]
    k_ptr,  # [B, KV, L, D], any strides but the last
    v_ptr,
    mask_ptr,  # [B or 1, L] bool
    best_ptr,  # [B, SPLITS, H] fp32: the largest logit of each split
    norm_ptr,  # [B, SPLITS, H] fp32: Σ exp(logit - best)
    part_ptr,  # [B, SPLITS, H, D] fp32: Σ exp(logit - best) v
    scale,
    L,
    H,
    group,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D as a power of two
    HEADS: tl.constexpr,  # group as a power of two from 16
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    kv, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    d = tl.arange(0, WIDTH)
    heads = tl.arange(0, HEADS)
    ours = (heads < group)[:, None] & (d < D)[None, :]
    begin(PDL)
    row = batch * H + kv * group + heads
    # A cache of many sequences can have more elements than 32 bits count.
    k_ptr += batch.to(tl.int64) * k_batch + kv.to(tl.int64) * k_head
    v_ptr += batch.to(tl.int64) * v_batch + kv.to(tl.int64) * v_head
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=ours, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    norm = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in tl.range(split * BLOCK, L, splits * BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = keys < L
        if MASKED:
            seen = tl.load(mask_ptr + batch * mask_batch + keys, mask=seen, other=0) != 0
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            inside = seen[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + keys[:, None] * k_row + d[None, :], mask=inside, other=0.0)
            v = tl.load(v_ptr + keys[:, None] * v_row + d[None, :], mask=inside, other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            logits = tl.where(seen[None, :], logits, float("-inf"))
            now = tl.maximum(best, tl.max(logits, axis=1))
            shift = tl.where(now == float("-inf"), 0.0, now)  # -inf - -inf is no number
            weights = tl.exp(logits - shift[:, None])
            shrink = tl.exp(best - shift)
            norm = norm * shrink + tl.sum(weights, axis=1)
            total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            best = now
    place = (batch * splits + split) * H + kv * group + heads
    tl.store(best_ptr + place, best, mask=heads < group)
    tl.store(norm_ptr + place, norm, mask=heads < group)
    tl.store(part_ptr + place[:, None] * D + d[None, :], total, mask=ours)


@triton.jit
def _combine(
    best_ptr,  # [B, SPLITS, H]
    norm_ptr,
    part_ptr,  # [B, SPLITS, H, D]
    t0,  # [H·D] fp32 each
    t1,
    t2,
    t3,
    y_ptr,  # [B, H, D]
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    H,
    K,  # H·D
    T,
    D: tl.constexpr,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    batch = tl.program_id(1)
    segments = tl.program_id(0) + tl.arange(0, 1)
    channels = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    inside = channels < K
    head = channels // D
    begin(PDL)
    best = tl.full([1, SEGMENT], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        place = (batch * SPLITS + split) * H + head
        best = tl.maximum(best, tl.load(best_ptr + place, mask=inside, other=0.0))
    norm = tl.zeros([1, SEGMENT], tl.float32)
    total = tl.zeros([1, SEGMENT], tl.float32)
    for split in tl.static_range(SPLITS):
        place = (batch * SPLITS + split) * H + head
        here = tl.load(best_ptr + place, mask=inside, other=0.0)
        weight = tl.where(here == float("-inf"), 0.0, tl.exp(here - best))
        norm += weight * tl.load(norm_ptr + place, mask=inside, other=0.0)
        total += weight * tl.load(part_ptr + (batch * SPLITS + split) * K + channels, mask=inside, other=0.0)
    y = tl.where(norm == 0.0, 0.0, total / norm).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + batch * K + channels, y, mask=inside)
    magnitude = tl.abs(y.to(tl.float32))
    for g in tl.static_range(G):
        t_ptr = t0 if g == 0 else t1 if g == 1 else t2 if g == 2 else t3
        threshold = tl.load(t_ptr + channels, mask=inside, other=0.0)
        keep = inside & ((magnitude <= threshold) == 0)
        list_kept(keep, channels, segments, index_ptr + g * T * SEGMENT, count_ptr + g * T, T, SEGMENT)


def _splits(length: int, heads: int) -> int:
    """Programs per key-value head: a power of two, and none without a block of keys."""
    blocks = triton.cdiv(length, BLOCK)
    return max(1, min(triton.next_power_of_2(blocks), triton.next_power_of_2(PROGRAMS // heads + 1) // 2))


def segment_size(channels: int) -> int:
    """Channels per segment of the list that attention writes."""
    return min(SEGMENT, compact.segment_size(channels))


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, thresholds: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        q: [B, H, 1, D].
        k, v: [B, KV, L, D], KV a divisor of H; query head h reads h // (H / KV).
        mask: [B or 1, 1, 1, L] bool, True where a key exists; None for all.
        scale: of the logits.
        thresholds: G tensors [H·D] fp32, of the Linears that read y; needs B = 1.

    Returns:
        y [B, H, 1, D] of q's dtype, 0 where no key exists; index [G, T, SEGMENT] and count [G, T] int32.
    """
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if mask is not None:
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0)
    flat = y.reshape(y.shape[0], -1)
    return (y, *compact.reference(flat, thresholds, segment_size(flat.shape[1])))


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, thresholds: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not serves(q) or k.stride(-1) != 1 or v.stride(-1) != 1:
        return reference(q, k, v, mask, scale, thresholds)
    batch, heads, _, width = q.shape
    shared, length = k.shape[1], k.shape[2]
    splits = _splits(length, shared * batch)
    q = q.contiguous()
    y = torch.empty_like(q)
    flat = y.view(batch, -1)
    index, count = compact.empty_list(flat, len(thresholds), segment_size(flat.shape[1]))
    best, norm = (q.new_empty((batch, splits, heads), dtype=torch.float32) for _ in range(2))
    parts = q.new_empty((batch, splits, heads, width), dtype=torch.float32)
    if mask is not None:
        mask = mask[:, 0, 0]
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    _attend[(shared, splits, batch)](
        q,
        k,
        v,
        mask,
        best,
        norm,
        parts,
        scale,
        length,
        heads,
        heads // shared,
        *k.stride()[:3],
        *v.stride()[:3],
        mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
        D=width,
        WIDTH=max(16, triton.next_power_of_2(width)),
        HEADS=max(16, triton.next_power_of_2(heads // shared)),
        BLOCK=BLOCK,
        MASKED=mask is not None,
        UPCAST=interpreted(),
        num_warps=4,
        **launch_options(q),
    )
    segment = index.shape[2]
    segments = triton.cdiv(flat.shape[1], segment)
    _combine[(segments, batch)](
        best,
        norm,
        parts,
        *slots(thresholds),
        y,
        index,
        count,
        heads,
        flat.shape[1],
        segments,
        D=width,
        G=len(thresholds),
        SPLITS=splits,
        SEGMENT=segment,
        num_warps=8 if segment > 256 else 4,
        **launch_options(q),
    )
    return y, index, count


def fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, thresholds: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    y = q.new_empty(q.shape)
    flat = y.view(y.shape[0], -1)
    return (y, *compact.empty_list(flat, len(thresholds), segment_size(flat.shape[1])))


decode_attention_op = register_op(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, Tensor[] thresholds) "
    "-> (Tensor, Tensor, Tensor)",
    decode_attention,
    fake,
)

"""Attention of one new token over a cache, which skips what the mask hides: `torch.ops.was.decode_attention`.

    y[h] = Σ_l softmax_l(scale · q[h] · k[h // group, l] where mask[l]) v[h // group, l]      h < H, l < L

A static cache is as long as it may ever get; the mask says which entries exist. A block of keys that is wholly masked
is not read, so a step costs what the used part of the cache costs. Keys are shared by `group` query heads without a
copy. With thresholds, y is also listed for the next Linears: see `compact`.

The keys of a head are split among programs, and the last of them to end adds up what all have found. They are added in
one order, whichever that was, so results are the same from run to run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import compact
from was_fx.kernels.parts.arrivals import COUNTERS, arrivals, last
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, interpreted, launch_options, list_kept, serves, slots

# Keys per step of a program.
BLOCK = 64
# Programs that all heads of a sequence share; each key-value head gets an equal number of them, and fewer counters.
PROGRAMS = COUNTERS
# Partial results that one program adds up. Where a key-value head has more, some programs add up so many each, and then
# one adds up theirs: a multiprocessor alone reads the parts of many splits too slowly.
FAN = 16


@triton.jit
def _store_part(best, norm, total, best_ptr, norm_ptr, part_ptr, place, group, ROWS: tl.constexpr, D: tl.constexpr):
    """The partial result of `group` heads, from the row `place` on."""
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, total.shape[1])
    tl.store(best_ptr + place + rows, best, mask=rows < group)
    tl.store(norm_ptr + place + rows, norm, mask=rows < group)
    inside = (rows < group)[:, None] & (d < D)[None, :]
    tl.store(part_ptr + (place + rows)[:, None] * D + d[None, :], total, mask=inside)


@triton.jit
def _sum_parts(
    best_ptr,
    norm_ptr,
    part_ptr,
    place,  # row of the first part's first head
    H,
    group,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # group as a power of two
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """best [ROWS], norm [ROWS] and total [ROWS, WIDTH] of several partial results, always added in the same order."""
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    ours = rows < group
    inside = ours[:, None] & (d < D)[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        best = tl.maximum(best, tl.load(best_ptr + place + part * H + rows, mask=ours, other=0.0))
    norm = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        row = place + part * H + rows
        here = tl.load(best_ptr + row, mask=ours, other=0.0)
        weight = tl.where(here == float("-inf"), 0.0, tl.exp(here - best))
        norm += weight * tl.load(norm_ptr + row, mask=ours, other=0.0)
        total += weight[:, None] * tl.load(part_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    return best, norm, total


@triton.jit
def _write(
    norm,  # [ROWS]
    total,  # [ROWS, WIDTH]
    threshold,  # [ROWS, WIDTH], of the first list
    t1,
    t2,
    t3,
    y_ptr,
    index_ptr,
    count_ptr,
    batch,
    kv,
    group,
    H,
    T,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    G: tl.constexpr,
):
    """Write y of the heads of a key-value head, and list it: their channels are a segment."""
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (rows < group)[:, None] & (d < D)[None, :]
    channels = (kv * group + rows)[:, None] * D + d[None, :]
    norm = norm[:, None]
    y = tl.where(norm == 0.0, 0.0, total / norm).to(y_ptr.dtype.element_ty)
    segments = kv + tl.arange(0, 1)
    for g in tl.static_range(G):
        if g > 0:
            t_ptr = t1 if g == 1 else t2 if g == 2 else t3
            threshold = tl.load(t_ptr + channels, mask=inside, other=0.0)
        keep = inside & ((tl.abs(y.to(tl.float32)) <= threshold) == 0)
        list_kept(
            tl.reshape(keep, [1, ROWS * WIDTH]),
            tl.reshape(channels, [1, ROWS * WIDTH]),
            segments,
            index_ptr + g * T * SEGMENT,
            count_ptr + g * T,
            T,
            SEGMENT,
        )
    tl.store(y_ptr + batch * H * D + channels, y, mask=inside)


@triton.jit
def _decode_attention(
    q_ptr,  # [B, H, D]
    k_ptr,  # [B, KV, L, D], any strides but the last
    v_ptr,
    mask_ptr,  # [B or 1, L] bool
    best_ptr,  # [B, SPLITS + BUNDLES, H] fp32: the largest logit of each split, and of FAN of them
    norm_ptr,  # [B, SPLITS + BUNDLES, H] fp32: Σ exp(logit - best)
    part_ptr,  # [B, SPLITS + BUNDLES, H, D] fp32: Σ exp(logit - best) v
    arrivals_ptr,  # [B·KV·(BUNDLES + 1)] int32, 0 before and after
    t0,  # [H·D] fp32 each
    t1,
    t2,
    t3,
    y_ptr,  # [B, H, D]
    index_ptr,  # [G, KV, SEGMENT]
    count_ptr,  # [G, KV]
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
    ROWS: tl.constexpr,  # group as a power of two
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    FAN: tl.constexpr,  # partial results that one program adds up
    BUNDLES: tl.constexpr,  # SPLITS / FAN where that is more than 1, or 0
    SEGMENT: tl.constexpr,
    G: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    kv, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared = tl.num_programs(0)
    d = tl.arange(0, WIDTH)
    heads = tl.arange(0, HEADS)
    ours = (heads < group)[:, None] & (d < D)[None, :]
    # No kernel writes thresholds, so the first list's are read before those before this one have ended.
    OUT: tl.constexpr = HEADS if SPLITS == 1 else ROWS
    threshold = tl.zeros([OUT, WIDTH], tl.float32)
    if G > 0:
        out = tl.arange(0, OUT)
        listed = (out < group)[:, None] & (d < D)[None, :]
        threshold = tl.load(t0 + (kv * group + out)[:, None] * D + d[None, :], mask=listed, other=0.0)
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
    for start in tl.range(split * BLOCK, L, SPLITS * BLOCK):
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
    if SPLITS == 1:
        _write(
            norm, total, threshold, t1, t2, t3, y_ptr, index_ptr, count_ptr, batch, kv, group, H, shared,
            HEADS, D, WIDTH, SEGMENT, G,
        )  # fmt: skip
    else:
        first = batch * (SPLITS + BUNDLES) * H + kv * group
        arrivals_ptr += (batch * shared + kv) * (BUNDLES + 1)
        bundle = split // FAN
        _store_part(best, norm, total, best_ptr, norm_ptr, part_ptr, first + split * H, group, HEADS, D)
        if last(arrivals_ptr + bundle, FAN):
            best1, norm1, total1 = _sum_parts(
                best_ptr, norm_ptr, part_ptr, first + bundle * FAN * H, H, group, FAN, ROWS, D, WIDTH
            )
            if BUNDLES == 0:
                _write(
                    norm1, total1, threshold, t1, t2, t3, y_ptr, index_ptr, count_ptr, batch, kv, group, H, shared,
                    ROWS, D, WIDTH, SEGMENT, G,
                )  # fmt: skip
            else:
                place = first + SPLITS * H
                _store_part(best1, norm1, total1, best_ptr, norm_ptr, part_ptr, place + bundle * H, group, ROWS, D)
                if last(arrivals_ptr + BUNDLES, BUNDLES):
                    _, norm2, total2 = _sum_parts(
                        best_ptr, norm_ptr, part_ptr, place, H, group, BUNDLES, ROWS, D, WIDTH
                    )
                    _write(
                        norm2, total2, threshold, t1, t2, t3, y_ptr, index_ptr, count_ptr, batch, kv, group, H, shared,
                        ROWS, D, WIDTH, SEGMENT, G,
                    )  # fmt: skip


def _splits(length: int, heads: int) -> int:
    """Programs per key-value head: a power of two, and none without a block of keys."""
    blocks = triton.cdiv(length, BLOCK)
    return max(1, min(triton.next_power_of_2(blocks), triton.next_power_of_2(PROGRAMS // heads + 1) // 2))


def segment_size(group: int, width: int) -> int:
    """Entries per segment of the list that attention writes: it has the channels of a key-value head's query heads."""
    return triton.next_power_of_2(group) * max(16, triton.next_power_of_2(width))


def _empty_list(q: Tensor, k: Tensor, siblings: int) -> tuple[Tensor, Tensor]:
    """index [G, KV, SEGMENT] and count [G, KV], both int32 and uninitialised."""
    shared = k.shape[1]
    segment = segment_size(q.shape[1] // shared, q.shape[3])
    index = q.new_empty((siblings, shared, segment), dtype=torch.int32)
    return index, q.new_empty((siblings, shared), dtype=torch.int32)


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
        y [B, H, 1, D] of q's dtype, 0 where no key exists; index [G, KV, SEGMENT] and count [G, KV] int32 as of
        `compact`, but a segment has the channels of one key-value head's query heads.
    """
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if mask is not None:
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0)
    index, count = _empty_list(q, k, len(thresholds))
    flat = y.reshape(y.shape[0], -1)
    channels = flat.shape[1] // k.shape[1]
    for s in range(k.shape[1] if thresholds else 0):
        own = slice(s * channels, (s + 1) * channels)
        listed, count[:, s : s + 1] = compact.reference(flat[:, own], [t[own] for t in thresholds], index.shape[2])
        index[:, s : s + 1] = listed + own.start
    return y, index, count


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    thresholds: Sequence[Tensor] = (),
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves. `counters` are of `arrivals`; without them a launch makes some."""
    if not serves(q) or k.stride(-1) != 1 or v.stride(-1) != 1:
        return reference(q, k, v, mask, scale, thresholds)
    batch, heads, _, width = q.shape
    shared, length = k.shape[1], k.shape[2]
    group = heads // shared
    splits = _splits(length, shared * batch)
    bundles = splits // FAN if splits > FAN else 0
    q = q.contiguous()
    y = torch.empty_like(q)
    index, count = _empty_list(q, k, len(thresholds))
    best = norm = parts = None
    if splits == 1:
        counters = None
    else:
        best, norm = (q.new_empty((batch, splits + bundles, heads), dtype=torch.float32) for _ in range(2))
        parts = q.new_empty((batch, splits + bundles, heads, width), dtype=torch.float32)
        counters = arrivals(q) if counters is None else counters
    if mask is not None:
        mask = mask[:, 0, 0]
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    _decode_attention[(shared, splits, batch)](
        q,
        k,
        v,
        mask,
        best,
        norm,
        parts,
        counters,
        *slots(thresholds),
        y,
        index,
        count,
        scale,
        length,
        heads,
        group,
        *k.stride()[:3],
        *v.stride()[:3],
        mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
        D=width,
        WIDTH=max(16, triton.next_power_of_2(width)),
        HEADS=max(16, triton.next_power_of_2(group)),
        ROWS=triton.next_power_of_2(group),
        BLOCK=BLOCK,
        SPLITS=splits,
        FAN=min(FAN, splits),
        BUNDLES=bundles,
        SEGMENT=index.shape[2],
        G=len(thresholds),
        MASKED=mask is not None,
        UPCAST=interpreted(),
        num_warps=8,
        **launch_options(q),
    )
    return y, index, count


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    thresholds: Sequence[Tensor],
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    return (q.new_empty(q.shape), *_empty_list(q, k, len(thresholds)))


# It leaves `counters` as they were.
decode_attention_op = register_op(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, Tensor[] thresholds, "
    "Tensor? counters=None) -> (Tensor, Tensor, Tensor)",
    decode_attention,
    fake,
    any_strides=True,
)

"""Attention of one new token that turns q and k by its position and stores k and v: `torch.ops.was.rotary_attention`.

    q, k', v' = columns of Σ_s partial[s] + bias, rounded to the model's dtype
    q, k'     = x · cos + rotate_half(x) · sin                   rotate_half(x) = [-x[D/2:], x[:D/2]]
    k[:, position], v[:, position] = k', v'
    y         = decode_attention(q, k, v)                        see there

One kernel in place of two. Keys and values of earlier tokens are there before the product of q, k and v is, so where a
program has one block of them, it reads them before it waits for that product.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import decode_attention as attention
from was_fx.kernels.ops.decode_attention import attend, finish, first_threshold
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, serves, slots, sum_partials


@triton.jit
def _summed(
    partial_ptr, bias_ptr, channels, inside, width, PARTS: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr
):
    """The outputs of a Linear, rounded as the model rounds them."""
    x = sum_partials(partial_ptr, channels, inside, width, PARTS)
    if BIAS:
        x += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    return x.to(dtype)


@triton.jit
def _turned(
    partial_ptr,
    bias_ptr,
    heads,  # [ROWS]
    inside,  # [ROWS, WIDTH]
    cos,  # [1, WIDTH] fp32
    sin,
    width,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Outputs of a Linear by head [ROWS, WIDTH], turned by the token's position."""
    d = tl.arange(0, WIDTH)[None, :]
    first = heads[:, None] * D
    x = _summed(partial_ptr, bias_ptr, first + d, inside, width, PARTS, BIAS, dtype).to(tl.float32)
    partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
    other = _summed(partial_ptr, bias_ptr, first + partner, inside, width, PARTS, BIAS, dtype).to(tl.float32)
    return (x * cos + tl.where(d < D // 2, -other, other) * sin).to(dtype)


@triton.jit
def _rotary_attention(
    partial_ptr,  # [PARTS, width] fp32
    q_bias_ptr,  # [H·D]
    k_bias_ptr,  # [KV·D]
    v_bias_ptr,  # [KV·D]
    cos_ptr,  # [D]
    sin_ptr,  # [D]
    position_ptr,  # [1] integer
    k_ptr,  # [KV, L, D], any strides but the last
    v_ptr,
    mask_ptr,  # [L] bool
    best_ptr,  # this one and those below as of `_decode_attention`
    norm_ptr,
    part_ptr,
    arrivals_ptr,
    t0,
    t1,
    t2,
    t3,
    y_ptr,
    index_ptr,
    count_ptr,
    q_start,
    k_start,
    v_start,
    width,
    scale,
    L,
    H,
    group,
    k_head,
    k_row,
    v_head,
    v_row,
    PARTS: tl.constexpr,
    Q_BIAS: tl.constexpr,
    K_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    FAN: tl.constexpr,
    BUNDLES: tl.constexpr,
    SEGMENT: tl.constexpr,
    G: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    kv, split = tl.program_id(0), tl.program_id(1)
    shared = tl.num_programs(0)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    d = tl.arange(0, WIDTH)
    k_ptr += kv.to(tl.int64) * k_head
    v_ptr += kv.to(tl.int64) * v_head
    threshold = first_threshold(t0, kv, group, HEADS if SPLITS == 1 else ROWS, D, WIDTH, G)
    # No kernel of this step but this one writes the position, or the keys and values of earlier tokens.
    position = tl.load(position_ptr + tl.arange(0, 1))
    keys = split * BLOCK + tl.arange(0, BLOCK)
    before = (keys < L) & (keys < position)
    inside = before[:, None] & (d < D)[None, :]
    early_k = tl.load(k_ptr + keys[:, None] * k_row + d[None, :], mask=inside, other=0.0)
    early_v = tl.load(v_ptr + keys[:, None] * v_row + d[None, :], mask=inside, other=0.0)
    begin(PDL)
    cos = tl.load(cos_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    rows = tl.arange(0, ROWS)
    ours = (rows < group)[:, None] & (d < D)[None, :]
    q = _turned(
        partial_ptr + q_start, q_bias_ptr, kv * group + rows, ours, cos, sin, width, D, WIDTH, PARTS, Q_BIAS, dtype
    )
    # As many heads as a product on tensor cores needs; those too many are not looked at.
    q = tl.reshape(tl.broadcast_to(q[None, :, :], [HEADS // ROWS, ROWS, WIDTH]), [HEADS, WIDTH])
    one = kv + tl.arange(0, 1)
    own = (d < D)[None, :]
    new_k = _turned(partial_ptr + k_start, k_bias_ptr, one, own, cos, sin, width, D, WIDTH, PARTS, K_BIAS, dtype)
    new_v = _summed(partial_ptr + v_start, v_bias_ptr, one[:, None] * D + d[None, :], own, width, PARTS, V_BIAS, dtype)
    # One program of each head has the new key.
    here = (position >= 0) & (position < L) & ((position // BLOCK) % SPLITS == split)
    tl.store(k_ptr + position[:, None] * k_row + d[None, :], new_k, mask=own & here[:, None])
    tl.store(v_ptr + position[:, None] * v_row + d[None, :], new_v, mask=own & here[:, None])
    if MASKED:
        here = here & (tl.load(mask_ptr + position, mask=here, other=0) != 0)
    best = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
    best = tl.where(here, best, float("-inf"))
    norm = tl.exp(best - tl.where(best == float("-inf"), 0.0, best))
    total = norm[:, None].to(dtype).to(tl.float32) * tl.where(here[:, None], new_v, 0.0).to(tl.float32)
    if UPCAST:
        q, early_k, early_v = q.to(tl.float32), early_k.to(tl.float32), early_v.to(tl.float32)
    seen = (keys < L) & (keys != position)
    if MASKED:
        seen = seen & (tl.load(mask_ptr + keys, mask=seen, other=0) != 0)
    early = seen & before
    best, norm, total = attend(q, early_k, tl.where(early[:, None], early_v, 0.0), early, best, norm, total, scale)
    # Later keys of the first block are rarely seen.
    late = tl.max((seen & (before == 0)).to(tl.int32), axis=0) > 0
    for start in tl.range(tl.where(late, split, split + SPLITS) * BLOCK, L, SPLITS * BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = (keys < L) & (keys != position) & ((keys > position) | (keys >= (split + 1) * BLOCK))
        if MASKED:
            seen = seen & (tl.load(mask_ptr + keys, mask=seen, other=0) != 0)
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            inside = seen[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + keys[:, None] * k_row + d[None, :], mask=inside, other=0.0)
            v = tl.load(v_ptr + keys[:, None] * v_row + d[None, :], mask=inside, other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            best, norm, total = attend(q, k, v, seen, best, norm, total, scale)
    finish(
        best, norm, total, best_ptr, norm_ptr, part_ptr, arrivals_ptr, threshold, t1, t2, t3, y_ptr, index_ptr,
        count_ptr, 0, kv, split, group, H, shared, HEADS, ROWS, D, WIDTH, SPLITS, FAN, BUNDLES, SEGMENT, G,
    )  # fmt: skip


def reference(
    partial: Tensor,
    starts: Sequence[int],
    biases: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    heads: int,
    thresholds: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        partial: [S, 1, width] fp32, what `gather_gemv` gave for q, k and v, among others.
        starts: the columns where q, k and v begin.
        biases: of q [H·D], k [KV·D] and v [KV·D], or None.
        cos, sin: D numbers each, of the token's position; D even.
        position: one integer, below L: where k and v are stored.
        k, v: [1, KV, L, D], written there.
        mask: [1, 1, 1, L] bool, True where a key exists; None for all.
        scale: of the logits.
        heads: H, a multiple of KV.
        thresholds: G tensors [H·D] fp32, of the Linears that read y.

    Returns:
        y [1, H, 1, D] of k's dtype, index and count, as of `decode_attention`.
    """
    shared, _, width = k.shape[1:]
    total = partial.sum(0).flatten()

    def output(which: int, heads: int) -> Tensor:
        """[1, heads, 1, D]."""
        x, bias = total[starts[which] : starts[which] + heads * width], biases[which]
        return (x if bias is None else x + bias.float()).to(k.dtype).view(1, heads, 1, width)

    def turned(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos.flatten().float() + torch.cat((-second, first), -1) * sin.flatten().float()).to(x.dtype)

    place = position.view(1)
    k.index_copy_(2, place, turned(output(1, shared)))
    v.index_copy_(2, place, output(2, shared))
    return attention.reference(turned(output(0, heads)), k, v, mask, scale, thresholds)


def rotary_attention(
    partial: Tensor,
    starts: Sequence[int],
    biases: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    heads: int,
    thresholds: Sequence[Tensor] = (),
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves. `counters` are of `arrivals`; without them a launch makes some."""
    if not serves(k) or k.stride(-1) != 1 or v.stride(-1) != 1:
        return reference(partial, starts, biases, cos, sin, position, k, v, mask, scale, heads, thresholds)
    q = k.new_empty((1, heads, 1, k.shape[3]))
    plan = attention.plan(q, k, len(thresholds), counters)
    _rotary_attention[(k.shape[1], plan.splits)](
        partial,
        *biases,
        cos.contiguous(),
        sin.contiguous(),
        position,
        k,
        v,
        attention.mask_rows(mask),
        *plan.work,
        *slots(thresholds),
        *plan.results,
        *starts,
        partial.shape[-1],
        scale,
        k.shape[2],
        heads,
        heads // k.shape[1],
        *k.stride()[1:3],
        *v.stride()[1:3],
        PARTS=partial.shape[0],
        Q_BIAS=biases[0] is not None,
        K_BIAS=biases[1] is not None,
        V_BIAS=biases[2] is not None,
        MASKED=mask is not None,
        **plan.options,
        **launch_options(k),
    )
    return plan.results


def fake(
    partial: Tensor,
    starts: Sequence[int],
    biases: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    heads: int,
    thresholds: Sequence[Tensor],
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    y = k.new_empty((1, heads, 1, k.shape[3]))
    return y, *attention.empty_list(y, k, len(thresholds))


# It leaves `counters` as they were.
rotary_attention_op = register_op(
    "rotary_attention(Tensor partial, int[] starts, Tensor?[] biases, Tensor cos, Tensor sin, Tensor position, "
    "Tensor(a!) k, Tensor(b!) v, Tensor? mask, float scale, int heads, Tensor[] thresholds, Tensor? counters=None) "
    "-> (Tensor, Tensor, Tensor)",
    rotary_attention,
    fake,
    any_strides=True,
)

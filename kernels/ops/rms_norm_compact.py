"""RMSNorm that lists the channels it leaves for the next Linears: `torch.ops.was.rms_norm_compact`.

    h = residual (+ the Linear before, whose parts are added here: round(Σ_s partial[s] + bias))
    x = norm(h)                                     h, x [K], K = hidden size, one token
    index, count = compact(x, thresholds)           see `compact`

The style says where a model rounds:
    "cast_first"     x = weight · round(h · rsqrt(mean(h²) + ε))         Llama, Mistral, Qwen
    "cast_last"      x = round(weight · h · rsqrt(mean(h²) + ε))         OLMo 2, torch.nn.RMSNorm
    "unit_offset"    x = round((1 + weight) · h · rsqrt(mean(h²) + ε))   Gemma
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import compact
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, serves, slots, sum_partials

STYLES = ("cast_first", "cast_last", "unit_offset")

# Programs of one norm and one list. Each reads the whole of h for its mean square and for the number of kept channels
# before its share, and lists its share.
PROGRAMS = 8
WARPS = 8


@triton.jit
def _hidden(
    residual_ptr,  # [K]
    partial_ptr,  # [SPLITS, K] fp32
    bias_ptr,  # [K]
    channels,
    inside,
    K,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """h in fp32, rounded as the model rounds it."""
    h = tl.load(residual_ptr + channels, mask=inside, other=0.0)
    if SPLITS > 0:
        y = sum_partials(partial_ptr, channels, inside, K, SPLITS)
        if BIAS:
            y += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        h = (h.to(tl.float32) + y.to(h.dtype).to(tl.float32)).to(h.dtype)
    return h.to(tl.float32)


@triton.jit
def _normalised(h, scale, weight, STYLE: tl.constexpr, dtype: tl.constexpr):
    """x, in the model's dtype."""
    x = h * scale
    if STYLE == 0:
        x = x.to(dtype).to(tl.float32) * weight
    elif STYLE == 1:
        x = x * weight
    else:
        x = x * (1.0 + weight)
    return x.to(dtype)


@triton.jit
def _rms_norm_compact(
    residual_ptr,  # [K]
    partial_ptr,  # [SPLITS, K] fp32
    bias_ptr,  # [K]
    weight_ptr,  # [K]
    t0,  # [K] fp32 each
    t1,
    t2,
    t3,
    hidden_ptr,  # [K], written when SPLITS > 0
    x_ptr,  # [K]
    index_ptr,  # [G, CHANNELS]
    count_ptr,  # [G]
    eps,
    K,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    STYLE: tl.constexpr,
    CHANNELS: tl.constexpr,  # K as a power of two
    SHARE: tl.constexpr,  # channels that this program lists
    LISTS: tl.constexpr,
    PDL: tl.constexpr,
):
    g, share = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    whole = tl.arange(0, CHANNELS)
    channels = share * SHARE + tl.arange(0, SHARE)
    inside = channels < K
    # No kernel writes the norm's weight or the thresholds, so they are read before those before this one have ended.
    weights = tl.load(weight_ptr + whole, mask=whole < K, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if LISTS:
        t_ptr = t0
        if g == 1:
            t_ptr = t1
        if g == 2:
            t_ptr = t2
        if g == 3:
            t_ptr = t3
        thresholds = tl.load(t_ptr + whole, mask=whole < K, other=float("inf"))
        threshold = tl.load(t_ptr + channels, mask=inside, other=float("inf"))
    begin(PDL)
    h = _hidden(residual_ptr, partial_ptr, bias_ptr, whole, whole < K, K, SPLITS, BIAS)
    scale = tl.rsqrt(tl.sum(h * h, axis=0) / K + eps)
    own = _hidden(residual_ptr, partial_ptr, bias_ptr, channels, inside, K, SPLITS, BIAS)
    own_x = _normalised(own, scale, weight, STYLE, dtype)
    if g == 0:
        tl.store(x_ptr + channels, own_x, mask=inside)
        if SPLITS > 0:
            tl.store(hidden_ptr + channels, own.to(dtype), mask=inside)
    if LISTS:
        x = _normalised(h, scale, weights, STYLE, dtype)
        keep = (whole < K) & ((tl.abs(x.to(tl.float32)) <= thresholds) == 0)
        # Both sums in one: the channels kept before this share below, all of them above.
        sums = tl.sum(tl.where(keep, tl.where(whole < share * SHARE, 4294967297, 4294967296), 0), axis=0)
        keep = inside & ((tl.abs(own_x.to(tl.float32)) <= threshold) == 0)
        position = (sums & 4294967295).to(tl.int32) + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(index_ptr + g * CHANNELS + position, channels, mask=keep)
        if share == 0:
            tl.store(count_ptr + g, (sums >> 32).to(tl.int32))


def reference(
    residual: Tensor,
    partial: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    thresholds: Sequence[Tensor],
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        residual: [..., K] of one token, any floating dtype.
        partial: [S, 1, K] fp32, what `gather_gemv` gave for the Linear before; None when h is `residual`.
        bias: [K] of that Linear, or None.
        weight: [K], of the norm.
        thresholds: G tensors [K] fp32, of the Linears that read x.
        eps: ε.
        style: one of STYLES.

    Returns:
        h and x like `residual`; index [G, 1, K′] int32, K′ = K as a power
        of two, and count [G, 1] int32. h is not defined without `partial`.
    """
    dtype = residual.dtype
    h = residual
    if partial is not None:
        y = partial.sum(0).view(-1) if bias is None else partial.sum(0).view(-1) + bias.float()
        h = residual + y.to(dtype).view_as(residual)
    x = h.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if style == "cast_first":
        x = (weight * x.to(dtype)).to(dtype)
    else:
        x = (x * (weight.float() + (style == "unit_offset"))).to(dtype)
    return (
        torch.empty_like(h) if partial is None else h,
        x,
        *compact.reference(x, thresholds, triton.next_power_of_2(x.shape[-1])),
    )


def rms_norm_compact(
    residual: Tensor,
    partial: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    thresholds: Sequence[Tensor],
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not serves(residual):
        return reference(residual, partial, bias, weight, thresholds, eps, style)
    residual = residual.contiguous()
    hidden, x = torch.empty_like(residual), torch.empty_like(residual)
    channels = residual.shape[-1]
    whole = triton.next_power_of_2(channels)
    index, count = compact.empty_list(residual, len(thresholds), whole)
    programs = min(PROGRAMS, whole)
    _rms_norm_compact[(max(1, len(thresholds)), programs)](
        residual,
        partial,
        bias,
        weight,
        *slots(thresholds),
        hidden,
        x,
        index,
        count,
        eps,
        channels,
        SPLITS=0 if partial is None else partial.shape[0],
        BIAS=bias is not None,
        STYLE=STYLES.index(style),
        CHANNELS=whole,
        SHARE=whole // programs,
        LISTS=bool(thresholds),
        num_warps=min(WARPS, max(4, whole // 256)),
        **launch_options(residual),
    )
    return hidden, x, index, count


def fake(
    residual: Tensor,
    partial: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    thresholds: Sequence[Tensor],
    eps: float,
    style: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    like = residual.new_empty(residual.shape)
    return (
        like,
        like.new_empty(like.shape),
        *compact.empty_list(residual, len(thresholds), triton.next_power_of_2(residual.shape[-1])),
    )


rms_norm_compact_op = register_op(
    "rms_norm_compact(Tensor residual, Tensor? partial, Tensor? bias, Tensor weight, Tensor[] thresholds, "
    "float eps, str style) -> (Tensor, Tensor, Tensor, Tensor)",
    rms_norm_compact,
    fake,
)

"""List the channels that a decode step keeps: `torch.ops.was.compact`.

For each of G thresholds over one input x [M, K] of few tokens, channel k is kept when some token keeps it:

    keep_g[k] = any_m not |x[m, k]| ≤ t_g[k]

The list is made in T = ceil(K / SEGMENT) segments that need not know of each other, so any number of programs can write
it: entry (g, s, i) of `index` [G, T, SEGMENT] int32 is the i-th kept channel of segment s, in ascending order, for
i < `count`[g, s] [G, T] int32; what lies behind is undefined.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, list_kept, serves, slots

# Channels per segment: one program lists them. `gather_gemv` looks every channel up among the segments' counts, so more
# segments make it slower.
SEGMENT = 1024


def segment_size(channels: int) -> int:
    """Channels per segment of a list over K channels: a power of two, SEGMENT or the one that holds a smaller K."""
    return min(SEGMENT, max(16, triton.next_power_of_2(channels)))


def empty_list(x: Tensor, siblings: int, segment: int | None = None) -> tuple[Tensor, Tensor]:
    """index [G, T, SEGMENT] and count [G, T], both int32 and uninitialised, for x [..., K]."""
    segment = segment or segment_size(x.shape[-1])
    segments = -(-x.shape[-1] // segment)
    index = x.new_empty((siblings, segments, segment), dtype=torch.int32)
    return index, x.new_empty((siblings, segments), dtype=torch.int32)


@triton.jit
def _compact(
    x_ptr,  # [M, K]
    t0,  # [K] fp32 each
    t1,
    t2,
    t3,
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    M,
    K,
    T,
    G: tl.constexpr,
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    segments = tl.program_id(0) + tl.arange(0, 1)
    channels = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    inside = channels < K
    for g in tl.static_range(G):
        t_ptr = t0 if g == 0 else t1 if g == 1 else t2 if g == 2 else t3
        threshold = tl.load(t_ptr + channels, mask=inside, other=0.0)
        kept = tl.zeros([1, SEGMENT], tl.int32)
        for m in range(M):
            x = tl.load(x_ptr + m * K + channels, mask=inside, other=0.0).to(tl.float32)
            kept = kept | ((tl.abs(x) <= threshold) == 0).to(tl.int32)
        keep = inside & (kept > 0)
        list_kept(keep, channels, segments, index_ptr + g * T * SEGMENT, count_ptr + g * T, T, SEGMENT)


def reference(x: Tensor, thresholds: Sequence[Tensor], segment: int | None = None) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch; what lies behind the kept channels is the dropped ones.

    Args:
        x: [..., K].
        thresholds: G tensors [K] fp32.
        segment: channels per segment; `segment_size(K)` by default.

    Returns:
        index [G, T, SEGMENT] int32, count [G, T] int32.
    """
    index, count = empty_list(x, len(thresholds), segment)
    rows = x.reshape(-1, x.shape[-1])
    for g, threshold in enumerate(thresholds):
        keep = ~(rows.abs() <= threshold).all(0)
        keep = torch.nn.functional.pad(keep, (0, index[g].numel() - keep.numel())).view_as(index[g])
        order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)
        index[g] = order + torch.arange(keep.shape[0], device=x.device)[:, None] * keep.shape[1]
        count[g] = keep.sum(1)
    return index, count


def compact(x: Tensor, thresholds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not serves(x):
        return reference(x, thresholds)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    index, count = empty_list(rows, len(thresholds))
    _, segments, segment = index.shape
    _compact[(segments,)](
        rows,
        *slots(thresholds),
        index,
        count,
        rows.shape[0],
        rows.shape[1],
        segments,
        G=len(thresholds),
        SEGMENT=segment,
        num_warps=8 if segment > 512 else 2,
        **launch_options(x),
    )
    return index, count


compact_op = register_op(
    "compact(Tensor x, Tensor[] thresholds) -> (Tensor, Tensor)",
    compact,
    lambda x, thresholds: empty_list(x, len(thresholds)),
)

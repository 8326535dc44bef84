"""List the channels that each chosen expert keeps: `torch.ops.was.compact_experts`.

    keep[s, k] = not |x[s // c, k]| ≤ t[experts[s], k]          x [R, K], experts [S], S = R · c, t [E, K]

As `compact` lists them: entry (s, i, j) of `index` [S, T, SEGMENT] int32 is the j-th kept channel of segment i, for
j < `count`[s, i]. An expert outside 0 … E - 1 keeps none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops.compact import empty_list
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, list_kept, serves


@triton.jit
def _compact_experts(
    x_ptr,  # [R, K]
    t_ptr,  # [E, K] fp32
    expert_ptr,  # [S]
    index_ptr,  # [S, T, SEGMENT]
    count_ptr,  # [S, T]
    K,
    T,
    E,
    PER,  # experts of a row
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    pair = tl.program_id(1)
    segments = tl.program_id(0) + tl.arange(0, 1)
    channels = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    begin(PDL)
    expert = tl.load(expert_ptr + pair).to(tl.int64)
    inside = channels < tl.where((expert >= 0) & (expert < E), K, 0)
    threshold = tl.load(t_ptr + expert * K + channels, mask=inside, other=0.0)
    x = tl.load(x_ptr + (pair // PER) * K + channels, mask=inside, other=0.0).to(tl.float32)
    keep = inside & ((tl.abs(x) <= threshold) == 0)
    list_kept(keep, channels, segments, index_ptr + pair * T * SEGMENT, count_ptr + pair * T, T, SEGMENT)


def reference(x: Tensor, threshold: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch; what lies behind the kept channels is the dropped ones.

    Args:
        x: [R, K].
        threshold: [E, K] fp32.
        experts: [R · c] integers.

    Returns:
        index [S, T, SEGMENT] int32, count [S, T] int32.
    """
    index, count = empty_list(x, experts.shape[0])
    known = (experts >= 0) & (experts < len(threshold))
    rows = x.repeat_interleave(len(experts) // len(x), dim=0)
    keep = ~(rows.abs() <= threshold[experts.clamp(0, len(threshold) - 1)]) & known[:, None]
    keep = torch.nn.functional.pad(keep, (0, index[0].numel() - keep.shape[1])).view_as(index)
    order = torch.argsort((~keep).to(torch.int8), dim=2, stable=True)
    index.copy_(order + torch.arange(keep.shape[1], device=x.device)[:, None] * keep.shape[2])
    count.copy_(keep.sum(2))
    return index, count


def compact_experts(x: Tensor, threshold: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not serves(x):
        return reference(x, threshold, experts)
    index, count = empty_list(x, experts.shape[0])
    pairs, segments, segment = index.shape
    _compact_experts[(segments, pairs)](
        x.contiguous(),
        threshold,
        experts.contiguous(),
        index,
        count,
        x.shape[1],
        segments,
        threshold.shape[0],
        pairs // x.shape[0],
        SEGMENT=segment,
        num_warps=8 if segment > 512 else 2,
        **launch_options(x),
    )
    return index, count


compact_experts_op = register_op(
    "compact_experts(Tensor x, Tensor threshold, Tensor experts) -> (Tensor, Tensor)",
    compact_experts,
    lambda x, threshold, experts: empty_list(x, experts.shape[0]),
)

"""`torch.ops.was.count_dropped`: realised sparsity, counted where it happens.

counts[0] += number of dropped channels among the sparse tokens of x
counts[1] += number of channels of those tokens

`torch.ops.was.count_dropped_by_expert` counts the same for each expert's own rows.
"""

import torch
from torch import Tensor

from was_fx.kernels.parts.registration import register_op


def count_dropped(x: Tensor, threshold: Tensor, counts: Tensor, tokens: Tensor | None) -> None:
    """Add to `counts` in place.

    Args:
        x: [..., K], any floating dtype.
        threshold: [K] fp32.
        counts: [2] int64.
        tokens: bool, one element for each row of x: which tokens are sparse; None for all.
    """
    dropped = x.abs() <= threshold
    if tokens is None:
        counts[1] += x.numel()
    else:
        dropped = dropped & tokens.reshape(*x.shape[:-1], 1)
        counts[1] += tokens.sum() * x.shape[-1]
    counts[0] += dropped.sum()


def count_dropped_by_expert(
    x: Tensor, threshold: Tensor, counts: Tensor, experts: Tensor, tokens: Tensor | None
) -> None:
    """Add to `counts` in place.

    Args:
        x: [R, K], any floating dtype.
        threshold: [E, K] fp32.
        counts: [E, 2] int64.
        experts: [R · c], the experts of each row; a number outside 0 … E - 1 is not counted.
        tokens: bool [R]: which rows are sparse; None for all.
    """
    known = (experts >= 0) & (experts < len(threshold))
    rows = torch.arange(len(experts), device=x.device).div(len(experts) // len(x), rounding_mode="floor")
    seen = known if tokens is None else known & tokens[rows]
    chosen = experts.clamp(0, len(threshold) - 1)
    dropped = (x[rows].abs() <= threshold[chosen]).sum(1) * seen
    counts.index_add_(0, chosen, torch.stack([dropped, seen * x.shape[1]], dim=1).to(counts.dtype))


count_dropped_op = register_op(
    "count_dropped(Tensor x, Tensor threshold, Tensor(a!) counts, Tensor? tokens) -> ()",
    count_dropped,
    lambda x, threshold, counts, tokens: None,
)
count_dropped_by_expert_op = register_op(
    "count_dropped_by_expert(Tensor x, Tensor threshold, Tensor(a!) counts, Tensor experts, Tensor? tokens) -> ()",
    count_dropped_by_expert,
    lambda x, threshold, counts, experts, tokens: None,
)

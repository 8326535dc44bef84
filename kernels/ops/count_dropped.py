"""`torch.ops.was.count_dropped`: realised sparsity, counted where it happens.

counts[0] += number of dropped channels among the sparse tokens of x
counts[1] += number of channels of those tokens
"""

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


count_dropped_op = register_op(
    "count_dropped(Tensor x, Tensor threshold, Tensor(a!) counts, Tensor? tokens) -> ()",
    count_dropped,
    lambda x, threshold, counts, tokens: None,
)

"""`torch.ops.was.count_dropped`: realised sparsity, counted where it happens.

counts[0] += number of dropped channels among the sparse tokens of x
counts[1] += number of channels of those tokens
"""

import torch
from torch import Tensor

from was_fx.kernels.linear.sparse_linear import dropped_channels


def reference(x: Tensor, threshold: Tensor, counts: Tensor, sequence: int, dense: int) -> None:
    """Add to `counts` in place.

    Args:
        x: [..., K], any floating dtype.
        threshold: [K] fp32.
        counts: [2] int64.
        sequence, dense: as in `was::sparse_linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    sparse = rows.shape[0]
    if dense:
        sparse -= (rows.shape[0] // sequence) * min(dense, sequence)
    counts[0] += dropped_channels(rows, threshold, sequence, dense).sum()
    counts[1] += sparse * rows.shape[1]


_library = torch.library.Library("was", "FRAGMENT")
_library.define(
    "count_dropped(Tensor x, Tensor threshold, Tensor(a!) counts, SymInt sequence, SymInt dense) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("count_dropped", reference, "CompositeExplicitAutograd")
torch.library.register_fake("was::count_dropped", lambda x, threshold, counts, sequence, dense: None, lib=_library)

count_dropped = torch.ops.was.count_dropped.default

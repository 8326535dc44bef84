"""Sparse Linear on a CPU without a C++ compiler: gather the kept rows of Wᵀ through `embedding_bag`.

`embedding_bag(kept, Wᵀ, offsets, mode="sum", per_sample_weights=x[kept])` sums the kept rows of Wᵀ [K, N], each
scaled by its input, without copying them, and accumulates in fp32. Wᵀ must be row-contiguous: gathering from a
strided table was 50 times slower.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# One token is split over bags, because the bags are what runs in parallel. Each bag rounds its sum to the
# input's dtype, and more than one per thread was no faster (`benchmarks/cpu_kernels.py`).
BAGS_PER_THREAD = 1

# Most tokens a call may hold before the dense product, which reads W once for all of them, is faster (at 50 %
# sparsity; `benchmarks/cpu_kernels.py`).
MAX_TOKENS = {torch.float32: 4, torch.bfloat16: 4}


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the gather serves x [..., K] and weights [N_i, K]: few tokens on a CPU, Wᵀ row-contiguous."""
    if x.device.type != "cpu" or x.dtype not in MAX_TOKENS or not x.numel():
        return False
    tokens = x.numel() // x.shape[-1]
    return tokens <= MAX_TOKENS[x.dtype] and all(w.dtype == x.dtype and w.t().is_contiguous() for w in weights)


def sparse_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], thresholds: Sequence[Tensor]
) -> Tensor:
    """`was::sparse_linear` for the few tokens of a decode step; see `sparse_linear.reference` for the meaning."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        gather = _gather_one if rows.shape[0] == 1 else _gather
        y = gather(rows, weight.t(), threshold)
        outputs.append(y if bias is None else y + bias)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y.reshape(*x.shape[:-1], -1)


def _gather_one(row: Tensor, table: Tensor, threshold: Tensor) -> Tensor:
    """One token: row [1, K], table [K, N], threshold [K] -> [1, N]."""
    values = row.view(-1)
    kept = torch.le(values.abs(), threshold).logical_not_().nonzero().view(-1)
    bags = BAGS_PER_THREAD * torch.get_num_threads()
    offsets = torch.tensor([kept.shape[0] * bag // bags for bag in range(bags)])
    sums = torch.nn.functional.embedding_bag(kept, table, offsets, mode="sum", per_sample_weights=values[kept])
    return sums.sum(0, keepdim=True)


def _gather(rows: Tensor, table: Tensor, threshold: Tensor) -> Tensor:
    """A few tokens, one bag each: rows [M, K], table [K, N], threshold [K] -> [M, N]."""
    keep = torch.le(rows.abs(), threshold).logical_not_()
    token, channel = keep.nonzero(as_tuple=True)
    counts = keep.sum(-1)
    return torch.nn.functional.embedding_bag(
        channel, table, counts.cumsum(0) - counts, mode="sum", per_sample_weights=rows[token, channel]
    )

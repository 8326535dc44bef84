"""Sparse Linear on a CPU without a C++ compiler: gather the kept rows of Wᵀ through `embedding_bag`.

`embedding_bag(kept, Wᵀ, offsets, mode="sum", per_sample_weights=x[kept])` sums the kept rows of Wᵀ [K, N], each
scaled by its input, without copying them, and accumulates in fp32. Wᵀ must be row-contiguous: gathering from a
strided table was 50 times slower.

Siblings of equal N whose Wᵀ lie one after the other in memory are one table [G·K, N], so one call serves them all.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear.layout import follows

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
    for run in _adjacent_runs(weights):
        table, threshold = _as_table(weights[run]), _stack(thresholds[run])
        outputs.append(_gather_one(rows, table, threshold) if rows.shape[0] == 1 else _gather(rows, table, threshold))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    if any(bias is not None for bias in biases):
        y = y + torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return y.reshape(*x.shape[:-1], -1)


def _gather_one(row: Tensor, table: Tensor, threshold: Tensor) -> Tensor:
    """One token: row [1, K], table [G·K, N], threshold [G, K] -> [1, G·N]."""
    segments, channels = threshold.shape
    kept = torch.le(row.abs(), threshold).logical_not_().view(-1).nonzero().view(-1)
    values = row.view(-1)
    if segments == 1:
        values = values[kept]
        bounds = [0, kept.shape[0]]
    else:
        values = values[kept % channels]
        starts = torch.arange(0, (segments + 1) * channels, channels)
        bounds = torch.searchsorted(kept, starts).tolist()
    bags = BAGS_PER_THREAD * torch.get_num_threads()
    offsets = [begin + (end - begin) * bag // bags for begin, end in itertools.pairwise(bounds) for bag in range(bags)]
    sums = torch.nn.functional.embedding_bag(kept, table, torch.tensor(offsets), mode="sum", per_sample_weights=values)
    return sums.view(segments, bags, -1).sum(1).view(1, -1)


def _gather(rows: Tensor, table: Tensor, threshold: Tensor) -> Tensor:
    """A few tokens, one bag each: rows [M, K], table [G·K, N], threshold [G, K] -> [M, G·N]."""
    segments, channels = threshold.shape
    keep = torch.le(rows.abs(), threshold[:, None]).logical_not_()  # [G, M, K]
    segment, token, channel = keep.nonzero(as_tuple=True)
    counts = keep.sum(-1).view(-1)
    sums = torch.nn.functional.embedding_bag(
        channel + segment * channels,
        table,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=rows[token, channel],
    )
    return sums.view(segments, rows.shape[0], -1).transpose(0, 1).reshape(rows.shape[0], -1)


def _adjacent_runs(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of neighbours that one table can serve: equal N, Wᵀ one after the other in memory."""
    start = 0
    for i in range(1, len(weights) + 1):
        if i < len(weights) and weights[i].shape == weights[i - 1].shape and follows(weights[i - 1], weights[i]):
            continue
        yield slice(start, i)
        start = i


def _as_table(weights: Sequence[Tensor]) -> Tensor:
    """Adjacent weights [N, K] as one table [G·K, N] over the memory they already share."""
    n, k = weights[0].shape
    return weights[0].as_strided((len(weights) * k, n), (n, 1))


def _stack(thresholds: Sequence[Tensor]) -> Tensor:
    """Thresholds [K] as [G, K], without a copy where they lie one after the other."""
    dense = all(t.is_contiguous() for t in thresholds)
    if dense and all(follows(a, b) for a, b in itertools.pairwise(thresholds)):
        return thresholds[0].as_strided((len(thresholds), thresholds[0].shape[0]), (thresholds[0].shape[0], 1))
    return torch.stack(list(thresholds))

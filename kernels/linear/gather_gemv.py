"""Multiply one token by the listed rows of Wᵀ only: `torch.ops.was.gather_gemv`.

    partial[s, 0, n] = Σ over the s-th part of the kept channels k of  x[k] · W[n, k]             y = Σ_s partial[s]

The kept channels of each Linear are cut into S parts of equal size, whichever segments they lie in, so every program
reads as much as any other. Whoever reads y adds the parts, in order: no atomics, and no launch of its own where the
reader is fused.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.gemv_config import GemvConfig, gemv_config
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import note_served
from was_fx.kernels.parts.triton_parts import (
    MAX_SIBLINGS,
    begin,
    find_sibling,
    launch_options,
    listed_channels,
    of_sibling,
    serves,
    share_of_list,
    slots,
)


@triton.jit
def gather_kernel(
    x_ptr,  # [K]
    index_ptr,  # [G, T, SEGMENT]
    count_ptr,  # [G, T]
    w0,  # [K, N_g] each: Wᵀ, row-contiguous
    w1,
    w2,
    w3,
    expert_ptr,  # [P] of P pairs of a row and an expert
    partial_ptr,  # [S, 1, ΣN]; of pairs [S, P, N]
    K,
    T,
    N0,
    N1,
    N2,
    N3,
    PER,  # experts of a row
    G: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # T, as a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # an entry's offset needs 64 bits
    PDL: tl.constexpr,
    EXPERTS: tl.constexpr = False,  # x is [P / PER, K], the list of each pair, and w0 [E, K, N]
):
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    w_ptr = of_sibling(g, w0, w1, w2, w3)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
        w_ptr = tl.multiple_of(w_ptr, 16)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n
    begin(PDL)
    pair = tl.program_id(2)
    if EXPERTS:
        w_ptr += tl.load(expert_ptr + pair).to(tl.int64) * K * n
        if ALIGNED:
            w_ptr = tl.multiple_of(w_ptr, 16)
        x_ptr += (pair // PER) * K
    counts, ends, first, last = share_of_list(count_ptr + (g + pair) * T, T, K, split, splits, SEGMENTS)
    index_ptr += (g + pair) * T * SEGMENT
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    k, x = listed_channels(x_ptr, index_ptr, x_ptr, counts, ends, first, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS)
    for row in tl.range(first, last, ROWS):
        entries = (k.to(tl.int64) if WIDE else k)[:, None] * n + columns[None, :]
        listed = row + tl.arange(0, ROWS) < last
        w = tl.load(
            w_ptr + entries, mask=listed[:, None] & in_columns[None, :], other=0.0, eviction_policy="evict_first"
        )
        # The channels of the next step are looked up while this step's weights arrive.
        k_next, x_next = listed_channels(
            x_ptr, index_ptr, x_ptr, counts, ends, row + ROWS, last, 0, 1, K, 1, SEGMENT, SEGMENTS, ROWS
        )
        sums += x[:, None] * w.to(tl.float32)
        k, x = k_next, x_next
    width = N0 + N1 + N2 + N3
    place = (split * tl.num_programs(2) + pair) * width + start + columns
    tl.store(partial_ptr + place, tl.sum(sums, axis=0), mask=in_columns)


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and weights [N_g, K]: one token on a GPU, and Wᵀ row-contiguous."""
    if not serves(x) or not x.numel() or x.numel() != x.shape[-1]:
        return False
    return all(w.dtype == x.dtype and w.device == x.device and w.t().is_contiguous() for w in weights)


def reference(x: Tensor, index: Tensor, count: Tensor, weights: Sequence[Tensor], splits: int) -> Tensor:
    """The op's meaning in plain PyTorch.

    Args:
        x: [..., K], one token.
        index, count: the kept channels, as `compact` lists them.
        weights: G tensors [N_g, K] of x's dtype.
        splits: S.

    Returns:
        [S, 1, ΣN_g] fp32.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    parts = []
    for g, weight in enumerate(weights):
        ranks = torch.arange(index.shape[2], device=x.device) < count[g][:, None]
        kept = index[g][ranks].long()
        values = rows[:, kept]
        cuts = [len(kept) * s // splits for s in range(splits + 1)]
        parts.append(
            torch.stack([values[:, a:b] @ weight[:, kept[a:b]].float().t() for a, b in itertools.pairwise(cuts)])
        )
    return torch.cat(parts, dim=-1)


def gather_gemv(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    weights: Sequence[Tensor],
    splits: int,
    config: GemvConfig | None = None,
) -> Tensor:
    """See `reference`; by Triton where it serves. `config` overrides the tuned one."""
    if not supports(x, weights):
        note_served(weights, "gather_gemv_reference", "a GPU's kernels don't run here")
        return reference(x, index, count, weights, splits)
    note_served(weights, "gather_gemv", "one token on a GPU, kept channels listed by the kernel before")
    sizes = [weight.shape[0] for weight in weights]
    config = config or gemv_config(x.device, x.dtype, x.shape[-1], sizes)
    partial = x.new_empty((splits, 1, sum(sizes)), dtype=torch.float32)
    _, segments, segment = index.shape
    gather_kernel[(sum(triton.cdiv(n, config.columns) for n in sizes), splits)](
        x.contiguous(),
        index,
        count,
        *slots([weight.t() for weight in weights]),
        None,
        partial,
        x.shape[-1],
        segments,
        *sizes,
        *[0] * (MAX_SIBLINGS - len(sizes)),
        1,
        G=len(sizes),
        SEGMENT=segment,
        SEGMENTS=triton.next_power_of_2(segments),
        ROWS=config.rows,
        COLUMNS=config.columns,
        ALIGNED=all(n % 16 == 0 for n in sizes) and all(w.data_ptr() % 16 == 0 for w in weights),
        WIDE=max(sizes) * x.shape[-1] >= 2**31,
        num_warps=config.warps,
        **launch_options(x),
    )
    return partial


def fake(x: Tensor, index: Tensor, count: Tensor, weights: Sequence[Tensor], splits: int) -> Tensor:
    """What the op returns, uninitialised."""
    return x.new_empty((splits, 1, sum(w.shape[0] for w in weights)), dtype=torch.float32)


gather_gemv_op = register_op(
    "gather_gemv(Tensor x, Tensor index, Tensor count, Tensor[] weights, int splits) -> Tensor",
    lambda x, index, count, weights, splits: gather_gemv(x, index, count, weights, splits),
    fake,
)

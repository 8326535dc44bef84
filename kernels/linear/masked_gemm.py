"""Multiply a few tokens, each without its dropped channels, by all of Wᵀ: `torch.ops.was.masked_gemm`.

    partial[s, m, n] = Σ over the s-th part of the channels k of  x̃[m, k] · W[n, k]                y = Σ_s partial[s]

Several tokens keep nearly every channel between them, so every row of Wᵀ is read, once for all tokens and siblings, and
as fast as memory can; x̃ is made on the way. Whoever reads y adds the S parts, in order: no atomics, and no launch of
its own where the reader is fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.parts.gemv_config import multiprocessors
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import note_served
from was_fx.kernels.parts.triton_parts import (
    MAX_SIBLINGS,
    begin,
    find_sibling,
    interpreted,
    launch_options,
    of_sibling,
    serves,
    slots,
)

# Tokens that share one read of the weights: as many as one instruction of the tensor cores takes.
MAX_TOKENS = 16

# What tensor cores multiply at full speed.
DTYPES = (torch.bfloat16, torch.float16)

# Measured on an H200, Llama-3-8B shapes, 2 to 8 tokens.
_ROWS, _COLUMNS = 32, 128


@dataclass(frozen=True)
class MaskedGemmConfig:
    """Tile sizes of `masked_gemm`.

    Attributes:
        rows: channels per step.
        columns: output channels per program.
        splits: programs that share one tile of output channels.
        warps: of a program.
        stages: steps whose weights are on the way at a time.
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


@triton.jit
def _masked_gemm(
    x_ptr,  # [M, K]
    w0,  # [K, N_g] each: Wᵀ, row-contiguous
    w1,
    w2,
    w3,
    t0,  # [K] fp32 each
    t1,
    t2,
    t3,
    partial_ptr,  # [S, M, ΣN]
    M,
    K,
    N0,
    N1,
    N2,
    N3,
    G: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,  # ROWS divides K
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,  # an entry's offset needs 64 bits
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    split, splits = tl.program_id(1), tl.num_programs(1)
    g, tile, start, n = find_sibling(tl.program_id(0), N0, N1, N2, N3, G, COLUMNS)
    w_ptr = of_sibling(g, w0, w1, w2, w3)
    t_ptr = of_sibling(g, t0, t1, t2, t3)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
        w_ptr = tl.multiple_of(w_ptr, 16)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n
    tokens = tl.arange(0, TOKENS)
    in_tokens = tokens < M
    steps = tl.cdiv(K, ROWS)
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    begin(PDL)
    for step in range((steps * split) // splits, (steps * (split + 1)) // splits):
        k = step * ROWS + tl.arange(0, ROWS)
        here, there = in_tokens[:, None], in_columns[None, :]
        if EVEN:
            threshold = tl.load(t_ptr + k)
        else:
            inside = k < K
            here, there = here & inside[None, :], there & inside[:, None]
            threshold = tl.load(t_ptr + k, mask=inside, other=0.0)
        x = tl.load(x_ptr + tokens[:, None] * K + k[None, :], mask=here, other=0.0)
        entries = (k.to(tl.int64) if WIDE else k)[:, None] * n + columns[None, :]
        w = tl.load(w_ptr + entries, mask=there, other=0.0, eviction_policy="evict_first")
        exact = x.to(tl.float32)
        kept = tl.where(tl.abs(exact) <= threshold[None, :], 0.0, exact)
        if UPCAST:
            sums = tl.dot(kept, w.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(kept.to(w.dtype), w, sums)
    place = (split * M + tokens[:, None]) * (N0 + N1 + N2 + N3) + start + columns[None, :]
    tl.store(partial_ptr + place, sums, mask=in_tokens[:, None] & in_columns[None, :])


def supports(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether this serves x [..., K] and weights [N_g, K]: few tokens of 16 bits on a GPU, and Wᵀ row-contiguous."""
    if x.dtype not in DTYPES or not serves(x) or not x.numel() or x.numel() // x.shape[-1] > MAX_TOKENS:
        return False
    return all(w.dtype == x.dtype and w.device == x.device and w.t().is_contiguous() for w in weights)


def masked_gemm_config(device: torch.device, channels: int, sizes: Sequence[int]) -> MaskedGemmConfig:
    """The configuration for G Linears [N_g, K] that share an input.

    Two programs for each multiprocessor, all at once, with 40 KB of weights on the way for each.

    Args:
        device: the GPU.
        channels: K.
        sizes: N_g of each.
    """
    tiles = sum(triton.cdiv(n, _COLUMNS) for n in sizes)
    splits = max(1, min(8, 2 * multiprocessors(device) // tiles, channels // 256))
    return MaskedGemmConfig(_ROWS, _COLUMNS, splits, warps=4, stages=5)


def reference(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], splits: int) -> Tensor:
    """The op's meaning in plain PyTorch, in which the first part holds all of y.

    Args:
        x: [..., K], M tokens.
        weights: G tensors [N_g, K] of x's dtype.
        thresholds: G tensors [K] fp32.
        splits: S.

    Returns:
        [S, ..., ΣN_g] fp32.
    """
    exact = x.float()
    partial = fake(x, weights, thresholds, splits).zero_()
    partial[0] = torch.cat(
        [
            torch.nn.functional.linear(exact.masked_fill(exact.abs() <= threshold, 0), weight.float())
            for weight, threshold in zip(weights, thresholds, strict=True)
        ],
        dim=-1,
    )
    return partial


def masked_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    splits: int,
    config: MaskedGemmConfig | None = None,
) -> Tensor:
    """See `reference`; by Triton where it serves. `config` overrides that of the shape."""
    if not supports(x, weights):
        note_served(weights, "masked_gemm_reference", "a GPU's kernels don't run here")
        return reference(x, weights, thresholds, splits)
    note_served(weights, "masked_gemm", "a few tokens on a GPU, masked by the product itself")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, channels = rows.shape
    sizes = [weight.shape[0] for weight in weights]
    config = config or masked_gemm_config(x.device, channels, sizes)
    partial = fake(x, weights, thresholds, splits)
    _masked_gemm[(sum(triton.cdiv(n, config.columns) for n in sizes), splits)](
        rows,
        *slots([weight.t() for weight in weights]),
        *slots(thresholds),
        partial,
        tokens,
        channels,
        *sizes,
        *[0] * (MAX_SIBLINGS - len(sizes)),
        G=len(sizes),
        TOKENS=MAX_TOKENS,
        ROWS=config.rows,
        COLUMNS=config.columns,
        EVEN=channels % config.rows == 0,
        ALIGNED=all(n % 16 == 0 for n in sizes) and all(w.data_ptr() % 16 == 0 for w in weights),
        WIDE=max(sizes) * channels >= 2**31,
        UPCAST=interpreted(),
        num_warps=config.warps,
        num_stages=config.stages,
        **launch_options(x),
    )
    return partial


def fake(x: Tensor, weights: Sequence[Tensor], thresholds: Sequence[Tensor], splits: int) -> Tensor:
    """What the op returns, uninitialised."""
    return x.new_empty((splits, *x.shape[:-1], sum(weight.shape[0] for weight in weights)), dtype=torch.float32)


masked_gemm_op = register_op(
    "masked_gemm(Tensor x, Tensor[] weights, Tensor[] thresholds, int splits) -> Tensor",
    lambda x, weights, thresholds, splits: masked_gemm(x, weights, thresholds, splits),
    fake,
)

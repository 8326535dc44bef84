"""Multiply by the listed rows of the matrices of chosen experts: `torch.ops.was.gather_experts`.

    partial[i, s, n] = Σ over the i-th part of the kept channels k of the pair s of  x[s // c, k] · W[experts[s], n, k]

One launch for all pairs of a row of x and one of its experts, by the kernel of `gather_gemv`; y = Σ_i partial[i].
"""

import itertools

import torch
import triton
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import gather_kernel
from was_fx.kernels.linear.gather_quantized_gemv import launch_one
from was_fx.kernels.parts.gemv_config import GemvConfig, experts_config
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import note_served
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS, launch_options, serves, slots
from was_fx.kernels.quantized.rows import INT4, INT8, expert_rows, outputs_of

# Most pairs of a call: eight tokens of sixteen experts.
MAX_PAIRS = 128


def supports(x: Tensor, weight: Tensor, experts: Tensor) -> bool:
    """Whether this serves x [R, K] and W [E, N, K]: few pairs on a GPU, and rows of each Wᵀ contiguous."""
    if not serves(x) or not x.numel() or experts.shape[0] > MAX_PAIRS:
        return False
    return weight.dtype == x.dtype and weight.device == x.device and weight.mT.is_contiguous()


def reference(x: Tensor, index: Tensor, count: Tensor, weight: Tensor, experts: Tensor, splits: int) -> Tensor:
    """The op's meaning in plain PyTorch.

    Args:
        x: [R, K].
        index, count: the kept channels of each pair, as `compact_experts` lists them.
        weight: [E, N, K] of x's dtype.
        experts: [S], S = R · c.
        splits: I.

    Returns:
        [I, S, N] fp32.
    """
    partial = x.new_zeros((splits, len(experts), weight.shape[1]), dtype=torch.float32)
    for s, expert in enumerate(experts.tolist()):
        if not 0 <= expert < len(weight):
            continue
        kept = index[s][torch.arange(index.shape[2], device=x.device) < count[s][:, None]].long()
        values = x[s * len(x) // len(experts), kept].float()
        cuts = [len(kept) * i // splits for i in range(splits + 1)]
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            partial[i, s] = weight[expert][:, kept[a:b]].float() @ values[a:b]
    return partial


def gather_experts(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    weight: Tensor,
    experts: Tensor,
    splits: int,
    config: GemvConfig | None = None,
) -> Tensor:
    """See `reference`; by Triton where it serves. `config` overrides the tuned one."""
    if not supports(x, weight, experts):
        note_served((weight,), "gather_experts_reference", "a GPU's kernels don't run here")
        return reference(x, index, count, weight, experts, splits)
    note_served((weight,), "gather_experts", "few tokens on a GPU, kept channels listed by the kernel before")
    _, outputs, channels = weight.shape
    pairs, segments, segment = index.shape
    config = config or experts_config(x.device, x.dtype, channels, outputs, pairs)
    partial = x.new_empty((splits, pairs, outputs), dtype=torch.float32)
    gather_kernel[(triton.cdiv(outputs, config.columns), splits, pairs)](
        x.contiguous(),
        index,
        count,
        *slots([weight.mT]),
        experts.contiguous(),
        partial,
        channels,
        segments,
        outputs,
        *[0] * (MAX_SIBLINGS - 1),
        pairs // x.shape[0],
        G=1,
        SEGMENT=segment,
        SEGMENTS=triton.next_power_of_2(segments),
        ROWS=config.rows,
        COLUMNS=config.columns,
        ALIGNED=outputs % 16 == 0 and weight.data_ptr() % 16 == 0,
        WIDE=outputs * channels >= 2**31,
        num_warps=config.warps,
        EXPERTS=True,
        **launch_options(x),
    )
    return partial


def fake(x: Tensor, index: Tensor, count: Tensor, weight: Tensor, experts: Tensor, splits: int) -> Tensor:
    """What the op returns, uninitialised."""
    return x.new_empty((splits, experts.shape[0], weight.shape[1]), dtype=torch.float32)


gather_experts_op = register_op(
    "gather_experts(Tensor x, Tensor index, Tensor count, Tensor weight, Tensor experts, int splits) -> Tensor",
    lambda x, index, count, weight, experts, splits: gather_experts(x, index, count, weight, experts, splits),
    fake,
)


def quantized_config(x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor | None, experts: Tensor) -> GemvConfig:
    """The tile sizes of a product with quantised experts."""
    format = INT8 if groups is None else INT4
    return experts_config(x.device, format, x.shape[1], outputs_of(codes, scales, groups), experts.shape[0])


def quantized_reference(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    experts: Tensor,
    splits: int,
) -> Tensor:
    """`reference` with the weights of E experts stacked, each as `QuantizedRows`."""
    rows = [expert_rows(codes, scales, groups, e).dequantize(torch.float32) for e in range(len(codes))]
    return reference(x.float(), index, count, torch.stack(rows).mT, experts, splits)


def gather_quantized_experts(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    experts: Tensor,
    splits: int,
    config: GemvConfig | None = None,
) -> Tensor:
    """See `quantized_reference`; by Triton where it serves. `config` overrides the tuned one."""
    if not serves(x):
        note_served((codes,), "gather_quantized_experts_reference", "a GPU's kernels don't run here")
        return quantized_reference(x, index, count, codes, scales, groups, experts, splits)
    note_served((codes,), "gather_quantized_experts", "few tokens on a GPU, channels listed by the kernel before")
    outputs = outputs_of(codes, scales, groups)
    partial = x.new_empty((splits, experts.shape[0], outputs), dtype=torch.float32)
    launch_one(
        x.contiguous(),
        index,
        count,
        [codes],
        [scales],
        [] if groups is None else [groups],
        [outputs],
        partial,
        config or quantized_config(x, codes, scales, groups, experts),
        experts.contiguous(),
    )
    return partial


def _quantized_fake(
    x: Tensor,
    index: Tensor,
    count: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    experts: Tensor,
    splits: int,
) -> Tensor:
    return x.new_empty((splits, experts.shape[0], outputs_of(codes, scales, groups)), dtype=torch.float32)


gather_quantized_experts_op = register_op(
    "gather_quantized_experts(Tensor x, Tensor index, Tensor count, Tensor codes, Tensor scales, Tensor? groups, "
    "Tensor experts, int splits) -> Tensor",
    lambda x, index, count, codes, scales, groups, experts, splits: gather_quantized_experts(
        x, index, count, codes, scales, groups, experts, splits
    ),
    _quantized_fake,
)

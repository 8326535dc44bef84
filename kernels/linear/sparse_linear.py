"""The op every rewritten Linear becomes: `torch.ops.was.sparse_linear`.

Meaning, for each of G Linears that share the input x [..., K]:

    y_i = (x ⊙ [not |x| ≤ t_i]) W_iᵀ + b_i          W_i [N_i, K], b_i [N_i], t_i [K] fp32
    y   = concat(y_1, …, y_G)                        y [..., ΣN_i]

A channel whose magnitude is NaN is kept, so NaN travels as it does in a dense Linear.

Row r of x, flattened to [M, K], is token `r % sequence` of its sequence; the first `dense` tokens of
every sequence keep all their channels. Decode uses sequence = 1, dense = 0.

`reference` is the meaning and runs anywhere. `implementation` is the one place that chooses.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather

Implementation = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], Tensor]


def dropped_channels(x: Tensor, threshold: Tensor, sequence: int, dense: int) -> Tensor:
    """Which channels of which tokens are dropped.

    Args:
        x: [M, K], any floating dtype.
        threshold: [K] fp32, compared with |x| in fp32.
        sequence: tokens per sequence.
        dense: leading tokens of each sequence that keep every channel.

    Returns:
        bool [M, K].
    """
    dropped = x.abs() <= threshold
    if dense:
        token = torch.arange(x.shape[0], device=x.device) % sequence
        dropped &= (token >= dense)[:, None]
    return dropped


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    sequence: int = 1,
    dense: int = 0,
) -> Tensor:
    """The op's meaning in plain PyTorch; any device, floating dtype and strides.

    Args:
        x: [..., K].
        weights: G tensors [N_i, K] of x's dtype.
        biases: G entries, [N_i] or None.
        thresholds: G tensors [K] fp32.
        sequence: tokens per sequence, for `dense`.
        dense: leading tokens of each sequence that keep every channel.

    Returns:
        [..., ΣN_i], x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    outputs = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        kept = rows.masked_fill(dropped_channels(rows, threshold, sequence, dense), 0)
        outputs.append(torch.nn.functional.linear(kept, weight, bias))
    y = torch.cat(outputs, dim=-1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def implementation(x: Tensor, weights: Sequence[Tensor], dense: int) -> Implementation:
    """The implementation that serves these arguments: the first whose `supports` says yes, else the reference."""
    if dense:
        return reference
    if x.is_cuda:
        from was_fx.kernels.linear import gpu_gather  # imports triton

        return gpu_gather.sparse_linear if gpu_gather.supports(x, weights) else reference
    for candidate in (cpu_gather, cpu_embedding_bag):
        if candidate.supports(x, weights):
            return candidate.sparse_linear
    return reference


def _sparse_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    sequence: int,
    dense: int,
) -> Tensor:
    chosen = implementation(x, weights, dense)
    if chosen is reference:
        return reference(x, weights, biases, thresholds, sequence, dense)
    return chosen(x, weights, biases, thresholds)


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[Tensor],
    sequence: int,
    dense: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


_library = torch.library.Library("was", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] thresholds, "
    "SymInt sequence, SymInt dense) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
torch.library.register_fake("was::sparse_linear", _fake, lib=_library)

sparse_linear = torch.ops.was.sparse_linear.default

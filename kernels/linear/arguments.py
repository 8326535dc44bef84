"""What the ops of Linears refuse: arguments that don't fit each other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_arguments(
    op: str,
    x: Tensor,
    shape: Sequence[int],
    held: Sequence[Tensor],
    bias: Tensor | None,
    threshold: Tensor | None,
    tokens: Tensor | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse arguments that don't fit each other.

    Args:
        op: for the error.
        x: [..., K].
        shape: of the weight, which should be [N, K].
        held: the tensors that hold the weight.
        bias: [N] of x's dtype, or None.
        threshold: [K] fp32, or None.
        tokens: bool, one for each row of x, or None.
        dtype: of the weight; None where it is quantised.

    Raises:
        ValueError: says what was found and what was expected.
    """
    channels = x.shape[-1] if x.dim() else 0
    if len(shape) != 2 or shape[1] != channels or (threshold is not None and tuple(threshold.shape) != (channels,)):
        raise ValueError(
            f"{op}: x is {list(x.shape)}, the weight {list(shape)} and the threshold "
            f"{None if threshold is None else list(threshold.shape)}; expected x [..., K], weight [N, K], threshold [K]"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != shape[0]):
        raise ValueError(f"{op}: the bias is {list(bias.shape)}; expected [{shape[0]}]")
    wrong = dtype not in (None, x.dtype) or (threshold is not None and threshold.dtype != torch.float32)
    if wrong or (bias is not None and bias.dtype != x.dtype):
        weight = "" if dtype is None else f"the weight {dtype}, "
        raise ValueError(
            f"{op}: x is {x.dtype}, {weight}the bias {getattr(bias, 'dtype', None)} and the threshold "
            f"{getattr(threshold, 'dtype', None)}; expected one dtype, and fp32 for the threshold"
        )
    others = [each for each in (*held, bias, threshold) if each is not None]
    if any(each.device != x.device for each in others):
        raise ValueError(
            f"{op}: x is on {x.device}, the weight on {held[0].device}, the threshold on "
            f"{getattr(threshold, 'device', None)}; expected one device: move the whole model by model.to(device)"
        )
    if tokens is not None and (tokens.dtype != torch.bool or tokens.numel() * channels != x.numel()):
        raise ValueError(
            f"{op}: tokens is {tokens.dtype} {list(tokens.shape)}; expected bool, one for each row of x {list(x.shape)}"
        )

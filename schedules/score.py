"""The score of an input channel, the norms it is made of, and the thresholds a kernel compares with."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements converted to fp32 at a time: 32 MiB.
_BLOCK_ELEMENTS = 1 << 23


def to_fp32(value: float) -> float:
    """`value` rounded to the nearest fp32; infinite beyond the range of fp32."""
    return ctypes.c_float(value).value


@dataclass(frozen=True)
class Score:
    """How much an input channel counts: score_j = |x_j| · g_j^α with g_j = ‖W[:, j]‖ₚ.

    Attributes:
        exponent: α, finite and at least 0; rounded to fp32, as a schedule file holds it.
        norm: p, 1 or 2.

    Raises:
        ValueError: for any other exponent or norm.
    """

    exponent: float = 1.0
    norm: int = 1

    def __post_init__(self) -> None:
        exponent = to_fp32(self.exponent)
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"a score's exponent must be finite and at least 0, found {self.exponent!r}")
        _check_norm(self.norm)
        object.__setattr__(self, "exponent", exponent)

    @classmethod
    def named(cls, name: str) -> "Score":
        """The score of a published method: `was` (α = 1, p = 1), `teal` (α = 0), `wina` (α = 1, p = 2).

        Raises:
            ValueError: for another name.
        """
        named = {"was": cls(1.0, 1), "teal": cls(0.0, 1), "wina": cls(1.0, 2)}
        if name not in named:
            raise ValueError(f"unknown score {name!r}: expected one of {', '.join(named)}")
        return named[name]

    def __str__(self) -> str:
        if self.exponent == 0:
            return "|x|"
        return f"|x|·‖W‖{'₁₂'[self.norm - 1]}^{self.exponent:g}"


def channel_norms(weight: Tensor, norm: int) -> Tensor:
    """Norm of each input channel over the output channels: g_j = ‖W[:, j]‖ₚ.

    Args:
        weight: [N, K], any floating dtype, strides and device.
        norm: p, 1 or 2.

    Returns:
        [K] fp32 on the weight's device. Sums are taken in fp32, over 32 MiB of the weight at a time.

    Raises:
        ValueError: for another norm.
    """
    _check_norm(norm)
    outputs, inputs = weight.shape
    weight = weight.detach()
    norms = torch.empty(inputs, dtype=torch.float32, device=weight.device)
    # Column slices keep both layouts streaming: whole rows of Wᵀ when it is column-major, and segments of
    # at least a cache line per row when it is row-major.
    width = max(32, _BLOCK_ELEMENTS // max(outputs, 1))
    for start in range(0, inputs, width):
        block = weight[:, start : start + width].float()
        norms[start : start + width] = block.abs().sum(dim=0) if norm == 1 else block.square().sum(dim=0).sqrt()
    return norms


def channel_scale(norms: Tensor, exponent: float) -> Tensor:
    """What |x| is multiplied with: g^α, [K] fp32 on the device of the norms g, [K]; ones where α = 0."""
    return norms.float().pow(exponent)


def channel_thresholds(threshold: float, norms: Tensor, exponent: float) -> Tensor:
    """What |x| is compared with: t_j = τ / g_j^α. Channel j is kept iff |x_j| > t_j.

    Args:
        threshold: τ in score units, finite and at least 0.
        norms: g, [K].
        exponent: α, finite and at least 0.

    Returns:
        [K] fp32 on the norms' device. +inf (never kept) where g_j = 0 and α > 0; τ everywhere for α = 0.

    Raises:
        ValueError: for a threshold or exponent out of range.
    """
    for name, value in (("threshold", threshold), ("exponent", exponent)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"the {name} must be finite and at least 0, found {value!r}")
    scale = channel_scale(norms, exponent)
    return torch.where(scale > 0, threshold / scale, math.inf)


def _check_norm(norm: int) -> None:
    if isinstance(norm, bool) or norm not in (1, 2):
        raise ValueError(f"a channel norm is p = 1 or p = 2, found {norm!r}")

"""Quantiles of a stream of scores in bounded memory."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# A bin is one nonnegative bf16 value: 128 per octave over the whole range of fp32, so the range need not be
# known beforehand and no logarithm is taken.
_BINS = 1 << 15
_INFINITE = 0x7F80  # the bit pattern of +inf; the patterns above it are NaN


class ScoreHistogram:
    """Counts of nonnegative scores, rounded to bf16: 256 KiB, whatever the number of scores.

    A bin holds the scores that round to one bf16 value, so the value lies in the middle of its bin. Scores
    that come from bf16 activations alone are such values: a quantile then falls on the side of them that
    drops the share nearest to the one asked for.

    NaN and infinite scores are counted apart: quantiles are for a histogram without them.

    Attributes:
        total: number of scores added, the non-finite ones included.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with torch.inference_mode(False):  # counts from inference mode could not be added to outside it
            self._counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.total = 0

    @property
    def nonfinite(self) -> int:
        """Number of NaN and infinite scores added. Waits for the device."""
        return int(self._counts[_INFINITE:].sum())

    def add(self, scores: Tensor) -> None:
        """Count scores: any shape and floating dtype, on the histogram's device. The sign is ignored."""
        bins = scores.detach().to(torch.bfloat16).abs().view(torch.int16).flatten()
        self._counts += torch.bincount(bins, minlength=_BINS)
        self.total += bins.numel()

    @classmethod
    def sum(cls, histograms: Iterable["ScoreHistogram"]) -> "ScoreHistogram":
        """One of all scores that were added to these, on the CPU."""
        found = cls()
        for each in histograms:
            found._counts += each._counts.cpu()
            found.total += each.total
        return found

    def quantiles(self, levels: Tensor | Sequence[float]) -> Tensor:
        """Smallest τ with a share of scores ≤ τ of at least each level, linear inside a bin.

        Args:
            levels: [L], each from 0 to 1.

        Returns:
            [L] fp32 on the CPU, nondecreasing in the level; 0 for every level up to the share of zeros.
        """
        levels = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
        counts = self._counts.cpu().double()
        cumulative = counts.cumsum(0)
        rank = levels * self.total
        bins = torch.searchsorted(cumulative, rank)
        below = cumulative[bins] - counts[bins]
        inside = ((rank - below) / counts[bins].clamp(min=1)).clamp(0, 1)
        lower, upper = _edge(bins), _edge(bins + 1)
        return torch.where(bins == 0, 0.0, lower + inside * (upper - lower)).float()


def _edge(bins: Tensor) -> Tensor:
    """Lower edge of each bin, fp64: midway to the bf16 value below. Bin 0 is read as exact zeros."""
    bits = (bins.clamp(min=1) << 16) - 0x8000
    return bits.to(torch.int32).view(torch.float32).double()

"""Histograms of scores as TEAL, WAS and WINA release them, and their thresholds."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReleasedHistogram:
    """Counts of scores by bin, over all tokens and channels of one Linear's input.

    TEAL and WAS count signed values x·g in 10,000 bins, of which the first and the last hold 1 % each. WINA counts
    |x|·g, one bin for each value of fp16.

    Attributes:
        counts: [bins] fp64, at least 0.
        centers: middle of each bin, [bins] fp64, increasing.
    """

    counts: np.ndarray
    centers: np.ndarray

    @property
    def total(self) -> float:
        """How many values were counted: tokens × K."""
        return float(self.counts.sum())

    @property
    def signed(self) -> bool:
        """Whether values were counted with their sign."""
        return bool(self.centers[0] < 0)

    def threshold(self, sparsity: float) -> float:
        """τ in score units as the release's own code finds it, at least 0.

        A signed histogram is taken to be symmetric: τ is its quantile at 0.5 + sparsity/2. Between the middles of
        two bins the quantile is linear in the count. A share above what the histogram can tell apart, as the
        greedy search's last steps have it (up to 1 and beyond), gives the middle of the last bin.
        """
        if sparsity == 0:
            return 0.0
        share = 0.5 + sparsity / 2 if self.signed else sparsity
        cumulative = np.cumsum(self.counts)
        return max(0.0, float(np.interp(share * cumulative[-1], cumulative, self.centers)))


def read_histogram(content: Any, key: str) -> ReleasedHistogram:
    """The histogram `key` of a loaded `histograms.pt`: its entries `key` and `key_centers`, [bins] each.

    Raises:
        ValueError: if they are missing, or no histogram.
    """
    found = {name: content.get(name) for name in (key, f"{key}_centers")}
    for name, value in found.items():
        if not isinstance(value, Tensor) or not _is_vector(value):
            raise ValueError(f"{name!r} is {_kind(value)}, expected a tensor [bins] of numbers")
    counts, centers = (value.detach().to(torch.float64).numpy() for value in found.values())
    if counts.shape != centers.shape:
        raise ValueError(f"{key!r} has {len(counts)} bins, {key + '_centers'!r} has {len(centers)}")
    order = np.argsort(centers, kind="stable")
    counts, centers = counts[order], centers[order]
    if not (np.isfinite(counts).all() and np.isfinite(centers).all()):
        raise ValueError(f"{key!r} holds NaN or infinite values")
    if (counts < 0).any() or counts.sum() <= 0:
        raise ValueError(f"{key!r} has negative counts, or none at all")
    return ReleasedHistogram(counts, centers)


def _is_vector(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.numel() > 1 and tensor.layout == torch.strided and not tensor.is_complex()


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "missing" if value is None else f"a {type(value).__name__}"

"""Fisher weights corrected by what channels cost where the model drops them.

−x_j · ∂KL/∂x_j, summed over what is dropped, is twice what all of it costs, shared out among channels with their
interactions: with what else the same Linear drops, and with what others do. Fisher weights foresee x_j² g_j². A channel
that costs c times as much as that, compared with all together, gets g_j · √c, part of the way: how far is tried.

What is measured on a few thousand tokens is noisy. So a Linear is drawn to all together, and a channel to its Linear,
by the variance of each against how far they are spread (as James and Stein do).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FisherSettings:
    """Settings of the correction.

    Attributes:
        corrections: how many; each is measured where the last one ended.
        at: for a lower target they are measured at this sparsity, and the weights kept: where little is dropped it
            costs too little to tell channels apart.
        steps: shares of the way, in the logarithm, from the weights before to those measured; the best is taken.
        most: a channel counts for at most so many times as much as before, or as little.

    Raises:
        ValueError: for a number out of range.
    """

    corrections: int = 1
    at: float = 0.5
    steps: tuple[float, ...] = (0.125, 0.25, 0.5)
    most: float = 3.0

    def __post_init__(self) -> None:
        if self.corrections < 0:
            raise ValueError(f"fisher needs at least no correction, found {self.corrections}")
        if not 0 <= self.at < 1:
            raise ValueError(f"fisher needs a sparsity from 0 to below 1 to correct at, found {self.at}")
        if not (self.steps and all(0 < step <= 1 for step in self.steps) and self.most > 1):
            raise ValueError(
                f"fisher needs steps above 0 and at most 1, and most above 1, found {self.steps} and {self.most}"
            )


@dataclass(frozen=True, eq=False)
class DroppedCosts:
    """What a Linear's channels cost where the model drops them, per token.

    Attributes:
        nats: −x_j · ∂KL(dense ‖ sparse)/∂x_j where x_j was dropped, [K] fp32.
        variances: of `nats`, by how it differs from token to token, [K] fp32.
        squares: x_j² where it was dropped, [K] fp32.
    """

    nats: Tensor
    variances: Tensor
    squares: Tensor


def corrected_weights(
    weights: Mapping[str, Tensor],
    costs: Mapping[str, DroppedCosts],
    step: float,
    most: float = FisherSettings.most,
) -> dict[str, Tensor]:
    """Fisher weights after a correction, [K] fp32 by qualified name.

    Args:
        weights: g before it, [K].
        costs: of the same Linears.
        step: share of the way, in the logarithm.
        most: see `FisherSettings`.
    """
    foreseen = {name: weights[name].square() * costs[name].squares for name in weights}
    everything = sum(float(each.sum()) for each in foreseen.values())
    typical = sum(float(each.nats.sum()) for each in costs.values()) / everything if everything else 0.0
    if not (math.isfinite(typical) and typical > 0):  # nothing is dropped, or it costs nothing
        return dict(weights)
    found = {}
    for name, before in weights.items():
        cost = costs[name]
        ratio = _ratios(cost.nats / typical, cost.variances / typical**2, foreseen[name], most)
        found[name] = before * ratio ** (step / 2)
    return found


def _ratios(measured: Tensor, variances: Tensor, foreseen: Tensor, most: float) -> Tensor:
    """How many times as much as foreseen each channel of a Linear costs."""
    if not foreseen.sum() > 0:
        return torch.ones_like(foreseen)
    own = _drawn((measured.sum() - foreseen.sum())[None], variances.sum()[None])[0] / foreseen.sum() + 1
    expected = foreseen * own.clamp(1 / most, most)
    likely = expected + _drawn(measured - expected, variances, expected)
    return torch.where(foreseen > 0, likely / foreseen, own).clamp(1 / most, most)


def _drawn(differences: Tensor, variances: Tensor, scales: Tensor | None = None) -> Tensor:
    """Differences from what was expected, drawn to 0 by their noise.

    Args:
        differences: measured with these variances.
        variances: of each.
        scales: what differences without noise would be in proportion to; by default alike.
    """
    scales = torch.ones_like(differences) if scales is None else scales
    spread = ((differences.square() - variances).sum() / scales.square().sum().clamp_min(1e-30)).clamp_min(0)
    own = spread * scales.square()
    return differences * own / (own + variances).clamp_min(1e-30)

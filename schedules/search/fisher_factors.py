"""Factors on λ by projection and part of the depth: where the model drops channels, a group of Linears costs more or
less than is foreseen by Fisher weights, which are taken at the dense model.

A sweep raises the sparsity of one group at a time, and compares how much the divergence from the dense model rises with
what was foreseen. A group that costs c times as much gets λ / c.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from was_fx.schedules.blocks import find_blocks
from was_fx.schedules.experts import group_of
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.names import split_name

# No group's measured cost counts for more, or less, than by this factor in one sweep.
_MOST = 3.0


@dataclass(frozen=True)
class FisherSettings:
    """Settings of the sweeps.

    Attributes:
        sweeps: how many; each starts where the last one ended. With 0 there are no factors.
        windows: of validation tokens for each sweep, others each time.
        parts: of the depth.
        probe: by how much a group's sparsity is raised.
        step: share of the way, in the logarithm, from the factors before to those measured.

    Raises:
        ValueError: for a number out of range.
    """

    sweeps: int = 2
    windows: int = 2
    parts: int = 3
    probe: float = 0.2
    step: float = 0.5

    def __post_init__(self) -> None:
        if self.sweeps < 0 or min(self.windows, self.parts) < 1:
            raise ValueError(
                "fisher needs at least no sweep, one window and one part of the depth, "
                f"found {self.sweeps}, {self.windows} and {self.parts}"
            )
        if not (0 < self.probe < 1 and 0 < self.step <= 1):
            raise ValueError(
                f"fisher needs a probe above 0 and below 1 and a step above 0 and at most 1, found {self.probe} and "
                f"{self.step}"
            )


def linear_groups(shapes: Mapping[str, tuple[int, int]], parts: int) -> list[list[str]]:
    """Names of the Linears of each projection in each part of the depth.

    Args:
        shapes: (N, K) by qualified name.
        parts: as nearly alike as the number of blocks allows.
    """
    blocks = find_blocks(shapes)
    found: dict[tuple[str, int], list[str]] = {}
    for number, block in enumerate(blocks):
        for name in block.shapes:
            found.setdefault((split_name(group_of(name))[1], parts * number // len(blocks)), []).append(name)
    return list(found.values())


def raised(sparsities: Mapping[str, float], names: Collection[str], probe: float) -> dict[str, float]:
    """The sparsities with those of `names` higher by `probe`, or half-way to 1."""
    return {name: min(each + probe, 0.5 + 0.5 * each) if name in names else each for name, each in sparsities.items()}


def foreseen(
    scores: FisherScores,
    levels: Tensor,
    shares: Mapping[str, float],
    inputs: Mapping[str, int],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> float:
    """By how much the loss rises between two allocations, nats per token, as Fisher weights see it.

    A dropped x_j costs x_j² g_j² / 2, so that the thresholds by level, the quantiles of |x_j|·g_j, hold it all.

    Args:
        scores: of all Linears.
        levels: of their thresholds, [L].
        shares: of tokens that reach a Linear: 1, or less for an expert, by qualified name.
        inputs: K.
        before, after: sparsities.
    """
    at = levels.double().numpy()
    total = 0.0
    for name, start in before.items():
        if after[name] == start:
            continue
        squares = scores.thresholds[name].double().numpy() ** 2
        summed = np.concatenate([[0.0], np.cumsum((squares[1:] + squares[:-1]) / 2 * np.diff(at))])
        rise = np.interp(after[name], at, summed) - np.interp(start, at, summed)
        total += 0.5 * inputs[name] * shares[name] * float(rise)
    return total


def corrected(
    factors: Mapping[str, float],
    groups: Sequence[Collection[str]],
    rises: Sequence[float],
    expected: Sequence[float],
    step: float,
) -> dict[str, float]:
    """The factors on λ after a sweep.

    Args:
        factors: before it, by qualified name.
        groups: names of the Linears that were raised together.
        rises: of the divergence, nats per token, of each group.
        expected: what was foreseen for each, above 0.
        step: see `FisherSettings`.
    """
    measured, supposed = np.array(rises), np.array(expected)
    typical = max(float(measured.sum() / supposed.sum()), 1e-12)
    # The noise of a rise does not shrink with it: a group of which little is expected is drawn to the others.
    drawn = float(np.median(supposed))
    ratios = (measured + typical * drawn) / (supposed + drawn)
    logs = np.log(np.clip(ratios / typical, 1 / _MOST, _MOST))
    return {
        name: math.exp((1 - step) * math.log(factors[name]) - step * float(each))
        for names, each in zip(groups, logs, strict=True)
        for name in names
    }

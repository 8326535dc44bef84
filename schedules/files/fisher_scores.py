"""What a calibration knows of the loss: Fisher weights, and the quantiles of the scores made with them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FisherScores:
    """Of each Linear, by qualified name.

    Attributes:
        weights: g, [K] fp32: the root of the mean square of the loss's gradient by each input channel.
        thresholds: quantiles of |x_j|·g_j at the calibration's levels, [L] fp32, nondecreasing.
    """

    weights: Mapping[str, Tensor]
    thresholds: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", dict(self.weights))
        object.__setattr__(self, "thresholds", dict(self.thresholds))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FisherScores):
            return NotImplemented
        return all(
            mine.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in mine.items())
            for mine, theirs in ((self.weights, other.weights), (self.thresholds, other.thresholds))
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors


def fisher_problems(fisher: FisherScores, levels: Tensor, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Everything wrong with Fisher scores for Linears [N, K], one line per problem."""
    problems = []
    for what, found in (("Fisher weights", fisher.weights), ("Fisher thresholds", fisher.thresholds)):
        problems += [f"{name} has no {what}" for name in shapes if name not in found]
        problems += [f"{name} has {what}, but no shape" for name in found if name not in shapes]
    for name, shape in shapes.items():
        for what, tensor, length in (
            ("weights", fisher.weights.get(name), shape[1]),
            ("thresholds", fisher.thresholds.get(name), len(levels)),
        ):
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or tensor.shape != (length,):
                problems.append(f"{name}: the Fisher {what} are {list(tensor.shape)}, expected float32 [{length}]")
            elif not bool((tensor.isfinite() & (tensor >= 0)).all()):
                problems.append(f"{name}: the Fisher {what} hold NaN, infinite or negative values")
            elif what == "thresholds" and not bool((tensor.diff() >= 0).all()):
                problems.append(f"{name}: the Fisher thresholds decrease where the sparsity increases")
    return problems

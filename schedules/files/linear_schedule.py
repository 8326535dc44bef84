"""The numbers of one scheduled Linear, and what can be wrong with them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from was_fx.schedules.files.metadata import is_matrix_shape
from was_fx.schedules.score import channel_thresholds, to_fp32


@dataclass(frozen=True, eq=False)
class LinearSchedule:
    """What one Linear drops. Numbers are rounded to fp32, as the file holds them; a `Schedule` checks them.

    Attributes:
        sparsity: nominal share of dropped channels, from 0 to below 1.
        threshold: τ in score units, finite and at least 0.
        exponent: α of the Linear's score, finite and at least 0.
        channel_threshold: t, [K] fp32 on the CPU, which takes the place of τ / g^α; +inf never keeps.
    """

    sparsity: float
    threshold: float
    exponent: float
    channel_threshold: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("sparsity", "threshold", "exponent"):
            object.__setattr__(self, name, to_fp32(getattr(self, name)))
        if self.channel_threshold is not None:
            copy = self.channel_threshold.detach().to("cpu", torch.float32, copy=True).contiguous()
            object.__setattr__(self, "channel_threshold", copy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearSchedule):
            return NotImplemented
        return (
            (self.sparsity, self.threshold, self.exponent) == (other.sparsity, other.threshold, other.exponent)
        ) and _same(self.channel_threshold, other.channel_threshold)

    __hash__ = None  # type: ignore[assignment]  # holds a tensor

    def channel_thresholds(self, norms: Tensor) -> Tensor:
        """t, [K] fp32 on the device of the channel norms g, [K]: channel j is kept iff |x_j| > t_j.

        Raises:
            ValueError: the threshold or exponent is out of range.
        """
        if self.channel_threshold is not None:
            return self.channel_threshold.to(norms.device)
        return channel_thresholds(self.threshold, norms, self.exponent)


def schedule_problems(linears: Mapping[str, LinearSchedule], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Everything wrong with scheduled Linears and their shapes (N, K), one line per problem."""
    problems = [] if linears else ["no Linear is scheduled"]
    problems += [f"{name} has a shape but no schedule" for name in shapes if name not in linears]
    for name, linear in linears.items():
        shape = shapes.get(name)
        if shape is None:
            problems.append(f"{name} has no shape")
        elif not is_matrix_shape(shape):
            problems.append(f"{name} has the shape {shape!r}, expected (N, K)")
            shape = None
        problems += [f"{name}: {problem}" for problem in _linear_problems(linear, shape)]
    return problems


def _linear_problems(linear: LinearSchedule, shape: tuple[int, int] | None) -> list[str]:
    problems = []
    if not 0 <= linear.sparsity < 1:
        problems.append(f"the sparsity is {linear.sparsity}, expected at least 0 and below 1")
    for name, value in (("threshold", linear.threshold), ("exponent", linear.exponent)):
        if not (math.isfinite(value) and value >= 0):
            problems.append(f"the {name} is {value}, expected a finite number of at least 0")
    channels = linear.channel_threshold
    if channels is None:
        return problems
    if shape is not None and channels.shape != (shape[1],):
        problems.append(f"the channel_threshold is {list(channels.shape)}, expected [{shape[1]}]")
    if not bool((channels >= 0).all()):
        problems.append("the channel_threshold holds NaN or negative values, expected at least 0")
    return problems


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)

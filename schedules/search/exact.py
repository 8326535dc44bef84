"""Our own recipe: allocate over all Linears at once by measured sensitivities, solved exactly and measured again.

How much the loss rises with the sparsity of Linear i is modelled as cᵢ · eᵢ(s): eᵢ is the share of its output's energy
that is dropped at sparsity s (one pass over a text gives all of them), cᵢ its sensitivity. A sweep measures every cᵢ
where the search stands, by raising one Linear at a time on one window of tokens. So interactions count: each is
measured with all others as sparse as they are at that point. The solver then moves to the best allocation by these
curves, and the next sweep measures there. cᵢ is fitted to all sweeps by least squares, so that a step which drops
little energy, and rises by little but noise, counts for little; and drawn towards the product of a factor per block and
a factor per projection.

What is measured is the divergence from the dense model's predictions. Its noise is far below that of the loss, which
also has the noise of the text itself, so a few hundred tokens do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from was_fx.schedules.names import split_name
from was_fx.schedules.projection import Vector
from was_fx.schedules.search.curves import Curves, solve

# Least part of the mean sensitivity that a block or a projection is taken to have.
_LEAST = 0.3

# The divergences of the model with each of these sparsities from the dense one, in nats per token.
Divergences = Callable[[Sequence[Mapping[str, float]]], Sequence[float]]


@dataclass(frozen=True)
class ExactSettings:
    """Settings of the exact recipe.

    Attributes:
        sweeps: how often the sensitivities are measured.
        probe: by how much a sweep raises each Linear's sparsity.
        tokens: how many tokens of a window a sweep measures on; each sweep has another window.
        reach: how far from the target a Linear may go.
        limit: highest sparsity of a Linear.
        shrink: weight of the block × projection product against a Linear's own measure, from 0 to 1.
        floor: least sensitivity, as a share of the product.

    Raises:
        ValueError: for a number out of range.
    """

    sweeps: int = 4
    probe: float = 0.3
    tokens: int = 512
    reach: float = 0.35
    limit: float = 0.95
    shrink: float = 0.4
    floor: float = 0.15

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"exact needs at least one sweep, found {self.sweeps}")
        if self.tokens < 2:
            raise ValueError(f"exact needs at least two tokens to measure on, found {self.tokens}")
        for name in ("probe", "reach", "limit", "shrink", "floor"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"exact needs {name} above 0 and below 1, found {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Sweep:
    """What one sweep measured.

    Attributes:
        rises: of the divergence with each Linear raised alone, nats per token, [D].
        drops: share of output energy dropped more by it, [D], above 0.
    """

    rises: Vector
    drops: Vector


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be allocated.

    Attributes:
        names: qualified names of D Linears.
        energies: share of output energy dropped at each level, [D, G], from 0 to 1, nondecreasing.
        levels: sparsities, [G], from 0 to 1.
        savings: what each saves at each level, [D, G].
    """

    names: tuple[str, ...]
    energies: Vector
    levels: Vector
    savings: Vector

    def energy(self, sparsities: Vector) -> Vector:
        """Share of each Linear's output energy that is dropped, [D]."""
        each = [np.interp(s, self.levels, curve) for s, curve in zip(sparsities, self.energies, strict=True)]
        return np.array(each)

    def allocate(self, sensitivities: Vector, target: float, settings: ExactSettings) -> Vector:
        """The best allocation by these sensitivities that saves what the target saves when it is uniform.

        Args:
            sensitivities: cᵢ, [D], positive, nats per token for all of a Linear's output energy.
            target: model sparsity, above 0 and below 1.
            settings: bounds.

        Returns:
            Sparsities, [D], float64.

        Raises:
            ValueError: the bounds do not allow the target.
        """
        curves = Curves(self.levels, sensitivities[:, None] * self.energies, self.savings)
        count = len(self.names)
        lower = np.full(count, max(target - settings.reach, 0.0))
        upper = np.full(count, max(target, min(target + settings.reach, settings.limit)))
        return solve(curves, curves.saved(np.full(count, target)), lower, upper)


def sweep(problem: Problem, at: Vector, divergences: Divergences, settings: ExactSettings) -> Sweep:
    """How much the divergence rises when one Linear at a time drops more.

    Args:
        problem: the Linears.
        at: sparsities where to measure, [D].
        divergences: called once, with `at` itself and then with each Linear raised.
        settings: the step.

    Returns:
        Rises and drops, [D] each.
    """
    points = [at]
    for index in range(len(problem.names)):
        raised = at.copy()
        raised[index] = min(at[index] + settings.probe, 0.5 * (1 + at[index]))
        points.append(raised)
    start, *raised_to = divergences([named(problem.names, point) for point in points])
    drops = np.diagonal(np.stack([problem.energy(point) for point in points[1:]])) - problem.energy(at)
    return Sweep(np.array(raised_to) - start, np.maximum(drops, 1e-6))


def sensitivities(names: Sequence[str], sweeps: Sequence[Sweep], settings: ExactSettings) -> Vector:
    """cᵢ with the least squared error Σ (rise − cᵢ · drop)² over the sweeps, drawn towards a product of block and
    projection factors.

    Args:
        names: qualified names of the D Linears.
        sweeps: at least one.
        settings: how much it is drawn, and the floor.

    Returns:
        [D], float64, positive, in nats per token for all of a Linear's output energy.
    """
    rises, drops = np.stack([each.rises for each in sweeps]), np.stack([each.drops for each in sweeps])
    fitted = (rises * drops).sum(0) / (drops**2).sum(0)
    product = _product(names, fitted)
    return np.maximum((1 - settings.shrink) * fitted + settings.shrink * product, settings.floor * product)


def _product(names: Sequence[str], values: Vector) -> Vector:
    """The nearest a_block · b_projection to `values` in row and column sums; positive."""
    rows, columns = zip(*[split_name(name) for name in names], strict=True)
    row = np.unique([str(each) for each in rows], return_inverse=True)[1]
    column = np.unique(columns, return_inverse=True)[1]
    # However the noise falls, no block or projection is taken for nearly free: all of it would be dropped.
    total = max(float(values.sum()), 1e-12)
    of_row = np.maximum(np.bincount(row, values), _LEAST * total * np.bincount(row) / len(row))
    of_column = np.maximum(np.bincount(column, values), _LEAST * total * np.bincount(column) / len(column))
    left, right = np.ones(len(of_row)), of_column.copy()
    for _ in range(20):
        left = of_row / np.bincount(row, right[column])
        right = of_column / np.bincount(column, left[row])
    return left[row] * right[column]


def named(names: Sequence[str], values: Vector) -> dict[str, float]:
    """An allocation [D] by name."""
    return dict(zip(names, values.tolist(), strict=True))

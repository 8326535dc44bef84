"""The step of the recipe `exact`: sparsities of all Linears at once, by measured sensitivities."""

from collections.abc import Callable
from typing import Any

import numpy as np

from was_fx.schedules.blocks import block_levels
from was_fx.schedules.projection import Vector, project
from was_fx.schedules.search.exact import Problem, Sweep, named, sensitivities, sweep
from was_fx.schedules.search.latency import byte_savings
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.schedules.search.trial_runner import TrialRunner
from was_fx.searching.block_level_search import history, search_blocks
from was_fx.searching.output_energy import dropped_energy
from was_fx.searching.search_context import SearchContext, first_tokens
from was_fx.searching.search_trials import divergences

# Windows that the last points are compared on.
_CHECKS = 3
_LEVELS = np.linspace(0.0, 1.0, 101)


def allocate(
    context: SearchContext, table: ThresholdTable, runner: TrialRunner
) -> tuple[ThresholdTable, dict[str, float], dict[str, Any]]:
    """Sweeps, each at the best point by those before; the last points compared; then trials over blocks, if any.

    Returns:
        Thresholds measured at the answer, its sparsities by qualified name, and the history of the trials.
    """
    settings, names = context.recipe.exact, tuple(context.shapes)
    sample = first_tokens(context.samples, 2 * context.tokens.shape[1])
    context.spent["curves"] += sample.numel()
    energies = dropped_energy(context.model, table.exponents, sample, norm=table.norm, levels=_LEVELS)
    savings = byte_savings if context.latency is None else context.latency.savings
    problem = Problem(names, energies, _LEVELS, savings(context.shapes, _LEVELS))
    windows = np.random.default_rng(context.seed).permutation(len(context.tokens))
    at, weights = np.full(len(names), context.target), np.ones(len(names))
    sweeps: list[Sweep] = []
    visited = [at]
    for number in range(settings.sweeps):
        context.report(f"sensitivities of {len(names)} Linears", number, settings.sweeps)
        table = context.table_at(table, named(names, at))
        window = int(windows[number % len(windows)])
        measure = divergences(context, table, runner, f"sweep {number}", window)
        sweeps.append(sweep(problem, at, measure, settings))
        weights = sensitivities(names, sweeps, settings)
        at = problem.allocate(weights, context.target, settings)
        visited.append(at)
    table = context.table_at(table, named(names, at))
    # One noisy sweep can lead astray: of the last two points and the uniform one, the best on windows of their own.
    candidates = [named(names, point) for point in (*visited[:-3:-1], visited[0])]
    scores = np.zeros(len(candidates))
    for check in range(_CHECKS):
        window = int(windows[(settings.sweeps + check) % len(windows)])
        scores += divergences(context, table, runner, f"check {check}", window)(candidates)
    sparsities = candidates[int(np.argmin(scores))]
    if not context.trials:
        return table, sparsities, {}
    expand = _around(context, sparsities)
    center = block_levels(context.blocks, sparsities)
    result = search_blocks(context, table, expand, runner, lambda space: [space.center], center)
    return table, expand(result.levels), history(result)


def _around(context: SearchContext, sparsities: dict[str, float]) -> Callable[[Vector], dict[str, float]]:
    """From block levels to sparsities: those given, with all Linears of a block moved alike, within bounds."""

    def expand(levels: Vector) -> dict[str, float]:
        moved: dict[str, float] = {}
        for block, level in zip(context.blocks, levels, strict=True):
            own = [sparsities[name] for name in block.shapes]
            sizes = [outputs * inputs for outputs, inputs in block.shapes.values()]
            moved |= named(list(block.shapes), project(own, sizes, float(level), 0.0, context.recipe.exact.limit))
        return {name: moved[name] for name in sparsities}

    return expand

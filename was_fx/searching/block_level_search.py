"""The step of a search that looks for block levels: Bayesian, evolutionary or at random."""

from collections.abc import Callable
from typing import Any

from was_fx.schedules.blocks import block_levels
from was_fx.schedules.experts import groups
from was_fx.schedules.projection import Vector
from was_fx.schedules.search.block_search import BlockResult, search_levels
from was_fx.schedules.search.block_space import BlockSpace, block_space
from was_fx.schedules.search.optimizers import Optimizer
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.schedules.search.trial_runner import TrialRunner
from was_fx.searching.block_allocation import Expansion
from was_fx.searching.search_context import SearchContext
from was_fx.searching.search_trials import entries

# Coordinates of a Bayesian search over blocks: smooth profiles over depth.
_DIMENSIONS = 6


def search_blocks(
    context: SearchContext,
    table: ThresholdTable,
    expand: Expansion,
    runner: TrialRunner,
    starts: Callable[[BlockSpace], list[Vector]],
    center: Vector | None = None,
) -> BlockResult:
    """The best levels of `context.trials`, each expanded to sparsities of Linears.

    Args:
        context: of the search.
        table: thresholds of the trials.
        expand: from block levels to sparsities.
        runner: of the trials.
        starts: what to try first, after `context.start`.
        center: of the space's bounds; by default the target everywhere.
    """
    recipe, blocks = context.recipe, context.blocks
    space = block_space(
        [float(block.size) for block in blocks],
        context.target,
        recipe.margin,
        limit=recipe.greedy.limit,
        dimension=None if recipe.over == "evolutionary" else _DIMENSIONS,
        monotone=recipe.monotone,
        center=center,
    )
    name: Any = "bayesian" if recipe.over == "exact" else recipe.over
    first = starts(space)
    if context.start is not None:
        given = {name: entry.sparsity for name, entry in context.start.linears.items()}
        mean = {group: sum(given[name] for name in names) / len(names) for group, names in groups(given).items()}
        first.insert(0, block_levels(blocks, mean))
    return search_levels(
        space,
        Optimizer(name, space.dimension, context.trials, context.seed),
        runner,
        lambda levels: entries(table, expand(levels)),
        trials=context.trials,
        starts=first,
        batch=context.batch,
        progress=context.progress,
    )


def history(result: BlockResult) -> dict[str, Any]:
    """What a schedule's metadata keep of a search."""
    return {
        "best": [round(loss, 6) for loss in result.losses],
        "levels": [round(level, 6) for level in result.levels.tolist()],
        "stopped": result.stopped,
    }

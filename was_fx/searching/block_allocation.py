"""Allocation inside blocks: from a level of each block to the sparsities of its Linears, and exponents by Linear."""

from collections.abc import Callable, Mapping
from functools import cached_property

from was_fx.schedules.blocks import Block
from was_fx.schedules.projection import Vector
from was_fx.schedules.search.greedy import greedy_table
from was_fx.schedules.search.level_table import LevelTable, from_rows, uniform_table
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.searching.block_errors import BlockErrors, BlockInputs, linear_errors
from was_fx.searching.search_context import SearchContext, first_tokens

# Tokens for block errors: the greedy descent runs every block a thousand times on them.
_BLOCK_TOKENS = 256

Expansion = Callable[[Vector], Mapping[str, float]]


class BlockAllocation:
    """The step of a search that looks at one block at a time, on what the dense model calls it with."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context

    @cached_property
    def _inputs(self) -> BlockInputs:
        sample = first_tokens(self._context.samples, _BLOCK_TOKENS)
        self._context.spent["blocks"] += sample.numel()
        return BlockInputs(self._context.model, self._context.blocks, sample)

    def exponents(self) -> dict[str, float]:
        """α of each Linear by its own output error at the target; norm 2."""
        context = self._context
        tried = context.recipe.exponents
        chosen = dict.fromkeys(context.shapes, 0.0)
        for block in context.blocks:
            if block in self._inputs:
                found = linear_errors(context.model, self._inputs, block, tried, 2, context.target)
                chosen |= {name: min(errors, key=errors.__getitem__) for name, errors in found.items() if errors}
        context.spent["exponents"] += self._inputs.tokens * len(tried)
        return chosen

    def expansion(self, table: ThresholdTable) -> Expansion:
        """From block levels to sparsities of Linears, by the recipe."""
        recipe, blocks = self._context.recipe, self._context.blocks
        if recipe.inside == "greedy":
            tables = [self._greedy(block, table) for block in blocks]
        else:
            tables = [uniform_table(block, recipe.greedy.limit) for block in blocks]

        def expand(levels: Vector) -> dict[str, float]:
            each = [known.at(float(level), nearest=recipe.nearest) for known, level in zip(tables, levels, strict=True)]
            return {name: sparsity for part in each for name, sparsity in part.items()}

        return expand

    def _greedy(self, block: Block, table: ThresholdTable) -> LevelTable:
        context = self._context
        if block not in self._inputs:
            return uniform_table(block, context.recipe.greedy.limit)
        known = {} if context.level_tables is None else context.level_tables
        if block.name not in known:
            # A table that others will use goes up to the limit, one of this search as far as it can go.
            until = min(context.target + context.recipe.margin + 0.01, 1.0) if context.level_tables is None else 1.0
            known[block.name] = self._descend(block, table, until)
        return known[block.name]

    def _descend(self, block: Block, table: ThresholdTable, until: float) -> LevelTable:
        context = self._context
        context.report(f"greedy allocation in {block.name}")
        key = f"greedy {block.name}"
        record = context.log.recorded(key, until)
        if record is None:
            errors = BlockErrors(context.model, self._inputs, block, table, context.recipe.scored)
            found = greedy_table(block, errors, context.recipe.greedy, until=until)
            tokens = errors.calls * self._inputs.tokens // len(context.blocks)
            record = context.log.add(key, until, {"names": found.names, "rows": found.rows.tolist(), "tokens": tokens})
        context.spent["blocks"] += record["tokens"]
        return from_rows(tuple(record["names"]), block.weights, record["rows"])

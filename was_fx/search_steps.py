"""The steps of `search`: thresholds where the search looks, allocation inside blocks, over blocks, final thresholds."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from was_fx.backend import Executor as GraphExecutor
from was_fx.block_errors import BlockError, BlockInputs, linear_errors
from was_fx.calibration import measure_thresholds, recalibrate
from was_fx.linears import find_linears
from was_fx.output_energy import dropped_energy
from was_fx.schedules.block_search import BlockResult, Progress, SearchState, ramps, search_levels
from was_fx.schedules.block_space import BlockSpace, block_space
from was_fx.schedules.blocks import Block, block_levels, find_blocks
from was_fx.schedules.calibration import Calibration
from was_fx.schedules.exact import Problem, combine, sensitivities
from was_fx.schedules.greedy import greedy_table
from was_fx.schedules.latency import LatencyTable, byte_savings
from was_fx.schedules.level_table import LevelTable, from_rows, uniform_table
from was_fx.schedules.optimizers import Optimizer
from was_fx.schedules.projection import Vector, check_budget
from was_fx.schedules.recipes import Recipe
from was_fx.schedules.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.threshold_table import ThresholdTable, from_calibration
from was_fx.schedules.trial_log import TrialLog
from was_fx.schedules.trial_runner import Evaluate, Task, TrialRunner
from was_fx.sparsification import densify, sparsify
from was_fx.trial_evaluation import TrialEvaluator
from was_fx.workers import RemoteEvaluator, checkpoint_of

# Tokens for block errors: the greedy descent runs every block a thousand times on them.
_BLOCK_TOKENS = 256
# Tokens for thresholds where the search looks, measured again and again.
_THRESHOLD_TOKENS = 1024
# Tokens for the thresholds of the schedule that was found, in each of two rounds.
_FINAL_TOKENS = 4096
# Windows that the last points of the exact recipe are compared on.
_CHECKS = 3
# Coordinates of a Bayesian search over blocks: smooth profiles over depth.
_DIMENSIONS = 6
_LEVELS = np.linspace(0.0, 1.0, 101)


@dataclass(eq=False)
class SearchSteps:
    """One search. The attributes are the arguments of `was_fx.search`; `samples` are its calibration tokens.

    Attributes:
        spent: forward-pass tokens by step; a pass through one block counts as its share of all blocks.
    """

    model: nn.Module
    calibration: Calibration
    recipe: Recipe
    target: float
    trials: int
    seed: int
    tokens: Tensor
    samples: Tensor
    head: bool
    latency: LatencyTable | None
    start: Schedule | None
    level_tables: dict[str, LevelTable] | None
    log: TrialLog
    workers: Callable[[], Executor] | None
    batch: int
    batch_size: int
    executor: GraphExecutor
    progress: Progress | None
    spent: Counter[str] = field(default_factory=Counter)

    def run(self, settings: Mapping[str, Any]) -> Schedule:
        """The schedule; `settings` go into its metadata."""
        margin, limit = self.recipe.margin if self.recipe.searches else 1.0, self.recipe.greedy.limit
        bounds = max(self.target - margin, 0.0), min(self.target + margin, limit)
        check_budget(self.target, [float(block.size) for block in self._blocks], *bounds)
        table = self._dense_table
        history: dict[str, Any] = {}
        uniform = np.full(len(self._blocks), self.target)
        if self.recipe.over == "exact":
            with self._trials(table) as runner:
                table, sparsities, history = self._exact(table, runner)
        elif self.recipe.searches:
            expand = self._expansion(table)
            table = self._table_at(table, expand(uniform))
            with self._trials(table) as runner:
                result = self._search_levels(table, expand, runner, ramps)
            sparsities, history = dict(expand(result.levels)), _history(result)
        else:
            sparsities = dict(self._expansion(table)(uniform))
        metadata = ScheduleMetadata(
            recipe=self.recipe.name,
            target=self.target,
            seed=self.seed,
            search=dict(settings),
            excluded=tuple(name for name in self.calibration.shapes if name not in sparsities),
            calibration_text=self.calibration.text,
            calibration_tokens=self.calibration.tokens,
            fingerprint=self.calibration.fingerprint,
        )
        schedule = table.schedule(sparsities, metadata)
        if self.recipe.recalibrate:
            self._report("final thresholds")
            rounds, sample = 2, _some(self.samples, _FINAL_TOKENS)
            schedule = recalibrate(self.model, schedule, sample, rounds=rounds, batch_size=self.batch_size)
            self.spent["thresholds"] += rounds * sample.numel()
        return schedule.replace({}, history={**history, "tokens": dict(self.spent)})

    # --- thresholds -------------------------------------------------------------------------------------------------

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        shapes = dict(self.calibration.shapes)
        if self.head:
            shapes |= {name: linear.shape for name, linear in find_linears(self.model).items() if linear.head}
        return shapes

    @cached_property
    def _blocks(self) -> list[Block]:
        return find_blocks(self._shapes)

    @cached_property
    def _dense_table(self) -> ThresholdTable:
        """Thresholds of the dense model by the recipe's exponents: the calibration's, if it has them."""
        if self.recipe.score is not None and not self.head and not self.recipe.signed:
            return from_calibration(self.calibration)
        if self.recipe.score is None:
            exponents = self._exponents()
        else:
            exponents = dict.fromkeys(self._shapes, self.calibration.score.exponent)
        sample = _some(self.samples, self.recipe.calibration_tokens)
        self.spent["thresholds"] += sample.numel()
        norm = 2 if self.recipe.score is None else self.calibration.score.norm
        return measure_thresholds(
            self.model, exponents, sample, norm=norm, signed=self.recipe.signed, batch_size=self.batch_size
        )

    def _table_at(self, table: ThresholdTable, sparsities: Mapping[str, float]) -> ThresholdTable:
        """The same exponents' thresholds, measured while the model drops by `table`; paper recipes keep theirs."""
        if not self.recipe.recalibrate:
            return table
        sample = _some(self.samples, _THRESHOLD_TOKENS)
        self.spent["thresholds"] += sample.numel()
        return measure_thresholds(
            self.model,
            table.exponents,
            sample,
            norm=table.norm,
            dropping=table.schedule(sparsities, ScheduleMetadata()),
            batch_size=self.batch_size,
        )

    # --- inside a block ---------------------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> BlockInputs:
        sample = _some(self.samples, _BLOCK_TOKENS)
        self.spent["blocks"] += sample.numel()
        return BlockInputs(self.model, self._blocks, sample)

    def _exponents(self) -> dict[str, float]:
        """α of each Linear by its own output error at the target; norm 2."""
        chosen = dict.fromkeys(self._shapes, 0.0)
        for block in self._blocks:
            if block in self._inputs:
                found = linear_errors(self.model, self._inputs, block, self.recipe.exponents, 2, self.target)
                chosen |= {name: min(errors, key=errors.__getitem__) for name, errors in found.items() if errors}
        self.spent["exponents"] += self._inputs.tokens * len(self.recipe.exponents)
        return chosen

    def _expansion(self, table: ThresholdTable) -> Callable[[Vector], Mapping[str, float]]:
        """From block levels to sparsities of Linears."""
        limit = self.recipe.greedy.limit
        if self.recipe.inside == "greedy":
            tables = [self._greedy(block, table) for block in self._blocks]
        else:
            tables = [uniform_table(block, limit) for block in self._blocks]
        nearest = self.recipe.nearest

        def expand(levels: Vector) -> dict[str, float]:
            each = [known.at(float(level), nearest=nearest) for known, level in zip(tables, levels, strict=True)]
            return {name: sparsity for part in each for name, sparsity in part.items()}

        return expand

    def _greedy(self, block: Block, table: ThresholdTable) -> LevelTable:
        if block not in self._inputs:
            return uniform_table(block, self.recipe.greedy.limit)
        known = {} if self.level_tables is None else self.level_tables
        if block.name not in known:
            # A table that others will use goes up to the limit, one of this search as far as it can go.
            until = min(self.target + self.recipe.margin + 0.01, 1.0) if self.level_tables is None else 1.0
            known[block.name] = self._descend(block, table, until)
        return known[block.name]

    def _descend(self, block: Block, table: ThresholdTable, until: float) -> LevelTable:
        self._report(f"greedy allocation in {block.name}")
        key = f"greedy {block.name}"
        record = self.log.find(key, until)
        if record is None:
            error = BlockError(self.model, self._inputs, block, table, self.recipe.scored)
            found = greedy_table(block, error, self.recipe.greedy, until=until)
            tokens = error.calls * self._inputs.tokens // len(self._blocks)
            record = self.log.add(key, until, {"names": found.names, "rows": found.rows.tolist(), "tokens": tokens})
        self.spent["blocks"] += record["tokens"]
        return from_rows(tuple(record["names"]), block.weights, record["rows"])

    # --- over blocks ------------------------------------------------------------------------------------------------

    def _search_levels(
        self,
        table: ThresholdTable,
        expand: Callable[[Vector], Mapping[str, float]],
        runner: TrialRunner,
        starts: Callable[[BlockSpace], list[Vector]],
        center: Vector | None = None,
    ) -> BlockResult:
        weights = [float(block.size) for block in self._blocks]
        over = self.recipe.over
        space = block_space(
            weights,
            self.target,
            self.recipe.margin,
            limit=self.recipe.greedy.limit,
            dimension=None if over == "evolutionary" else _DIMENSIONS,
            order=self._order(table, runner),
            center=center,
        )
        name: Any = "bayesian" if over == "exact" else over
        optimizer = Optimizer(name, space.dimension, self.trials, self.seed)
        first = starts(space)
        if self.start is not None:
            first.insert(0, block_levels(self._blocks, {n: entry.sparsity for n, entry in self.start.linears.items()}))
        return search_levels(
            space,
            optimizer,
            runner,
            lambda levels: _entries(table, expand(levels)),
            trials=self.trials,
            starts=first,
            batch=self.batch,
            progress=self.progress,
        )

    def _order(self, table: ThresholdTable, runner: TrialRunner) -> list[int] | None:
        """The order along which levels must not fall."""
        count = len(self._blocks)
        if self.recipe.order == "off":
            return None
        if self.recipe.order == "depth":
            return list(range(count))
        raised = [{name: self.target for name in self._shapes}]
        for block in self._blocks:
            raised.append({**raised[0], **dict.fromkeys(block.shapes, min(self.target + 0.15, 0.95))})
        start, *rises = self._divergences(table, runner, "order", 0)(raised)
        per_weight = [(rise - start) / block.size for rise, block in zip(rises, self._blocks, strict=True)]
        return sorted(range(count), key=lambda index: -per_weight[index])

    # --- over all Linears at once -----------------------------------------------------------------------------------

    def _exact(
        self, table: ThresholdTable, runner: TrialRunner
    ) -> tuple[ThresholdTable, dict[str, float], dict[str, Any]]:
        settings, names = self.recipe.exact, tuple(self._shapes)
        sample = _some(self.samples, 2 * self.tokens.shape[1])
        self.spent["curves"] += sample.numel()
        energies = dropped_energy(self.model, table.exponents, sample, norm=table.norm, levels=_LEVELS)
        savings = byte_savings if self.latency is None else self.latency.savings
        problem = Problem(names, energies, _LEVELS, savings(self._shapes, _LEVELS))
        windows = np.random.default_rng(self.seed).permutation(len(self.tokens))
        at, sweeps, weights = np.full(len(names), self.target), [], np.ones(len(names))
        visited = [at]
        for sweep in range(settings.sweeps):
            self._report(f"sensitivities of {len(names)} Linears", sweep, settings.sweeps)
            table = self._table_at(table, _named(names, at))
            window = int(windows[sweep % len(windows)])
            divergences = self._divergences(table, runner, f"sweep {sweep}", window)
            sweeps.append(sensitivities(problem, at, divergences, settings))
            weights = combine(names, sweeps, settings)
            at = problem.allocate(weights, self.target, settings)
            visited.append(at)
        table = self._table_at(table, _named(names, at))
        # One noisy sweep can lead astray: of the last two points and the uniform one, the best on windows of their own.
        candidates = [_named(names, point) for point in (*visited[:-3:-1], visited[0])]
        scores = np.zeros(len(candidates))
        for check in range(_CHECKS):
            window = int(windows[(settings.sweeps + check) % len(windows)])
            scores += self._divergences(table, runner, f"check {check}", window)(candidates)
        sparsities = candidates[int(np.argmin(scores))]
        if not self.trials:
            return table, sparsities, {}
        expand = self._resolved(problem, weights)
        center = block_levels(self._blocks, sparsities)
        result = self._search_levels(table, expand, runner, lambda space: [space.center], center)
        return table, expand(result.levels), _history(result)

    def _resolved(self, problem: Problem, weights: Vector) -> Callable[[Vector], dict[str, float]]:
        """From block levels to sparsities: each block's own exact allocation at its level."""
        settings = self.recipe.exact
        index = {name: at for at, name in enumerate(problem.names)}

        def expand(levels: Vector) -> dict[str, float]:
            result: dict[str, float] = {}
            for block, level in zip(self._blocks, levels, strict=True):
                rows = [index[name] for name in block.shapes]
                names = tuple(block.shapes)
                part = Problem(names, problem.energies[rows], problem.levels, byte_savings(block.shapes, _LEVELS))
                result |= _named(names, part.allocate(weights[rows], float(level), settings))
            return {name: result[name] for name in problem.names}

        return expand

    def _divergences(
        self, table: ThresholdTable, runner: TrialRunner, label: str, window: int
    ) -> Callable[[Sequence[Mapping[str, float]]], list[float]]:
        length = min(self.recipe.exact.tokens, self.tokens.shape[1])
        self.spent["trials"] += length  # the dense predictions

        def measure(points: Sequence[Mapping[str, float]]) -> list[float]:
            tasks = [
                Task(
                    key=f"{label} probe {number}",
                    inputs={"linears": _entries(table, point), "window": window, "length": length},
                    notes={"window": window, "sparsities": [round(s, 6) for s in point.values()]},
                )
                for number, point in enumerate(points)
            ]
            return [result["divergence"] for result in runner.run(tasks)]

        return measure

    # --- running ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _trials(self, table: ThresholdTable) -> Iterator[TrialRunner]:
        """What runs trials: this process with the model sparsified meanwhile, or workers with models of their own."""
        metadata = ScheduleMetadata(fingerprint=self.calibration.fingerprint)
        schedule = table.schedule(dict.fromkeys(self._shapes, self.target), metadata)
        evaluate: Evaluate
        if self.workers is None:
            sparsify(self.model, schedule, executor=self.executor)
            evaluate = TrialEvaluator(
                self.model, schedule, self.tokens, batch_size=self.batch_size, executor=self.executor
            )
        else:
            parameter = next(self.model.parameters())
            evaluate = RemoteEvaluator(
                checkpoint=checkpoint_of(self.model),
                dtype=str(parameter.dtype).removeprefix("torch."),
                device=str(parameter.device),
                schedule=schedule,
                tokens=tuple(map(tuple, self.tokens.tolist())),
                batch_size=self.batch_size,
                executor=self.executor,
            )
        try:
            with TrialRunner(evaluate, self.log, self.workers) as runner:
                yield runner
                self.spent["trials"] += runner.tokens
        finally:
            if self.workers is None:
                densify(self.model)

    def _report(self, phase: str, done: int = 0, total: int = 0) -> None:
        if self.progress is not None:
            self.progress(SearchState(done, total, phase=phase))


def _entries(table: ThresholdTable, sparsities: Mapping[str, float]) -> dict[str, list[float]]:
    """[sparsity, τ, α] by qualified name."""
    found = {name: table.linear(name, sparsity) for name, sparsity in sparsities.items()}
    return {name: [entry.sparsity, entry.threshold, entry.exponent] for name, entry in found.items()}


def _named(names: Sequence[str], values: Vector) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _some(tokens: Tensor, count: int) -> Tensor:
    """The first rows with about `count` tokens, at least a part of one."""
    return tokens[: max(1, count // tokens.shape[1]), : max(2, count)]


def _history(result: BlockResult) -> dict[str, Any]:
    return {
        "best": [round(loss, 6) for loss in result.losses],
        "levels": [round(level, 6) for level in result.levels.tolist()],
        "stopped": result.stopped,
    }

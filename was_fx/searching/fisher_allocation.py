"""The recipe `fisher` on a model: λ found again on what the model's inputs are once it drops channels, and on request
weights corrected by what channels cost there."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from torch import Tensor

from was_fx.measure.calibrate import run_text
from was_fx.measure.fisher import dropped_costs, fisher_table
from was_fx.modules.linears import find_linears
from was_fx.schedules.experts import weights_read
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.search.fisher import allocate, allocate_time, channel_costs, fisher_schedule, fisher_scores_of
from was_fx.schedules.search.fisher_correction import corrected_weights
from was_fx.searching.divergence import DivergenceMeter
from was_fx.searching.search_context import SearchContext, first_tokens

# At high sparsity the first round still drifts, the third changes little.
_ROUNDS = 2
_TOKENS = 4096
# Tokens for a correction: a backward pass and three forward passes.
_CORRECTION_TOKENS = 12288
# Windows of validation tokens that schedules before and after corrections are compared on.
_CHECKS = 4


def search_fisher(context: SearchContext, metadata: ScheduleMetadata) -> Schedule:
    """The schedule at the context's target.

    Raises:
        ScheduleError: the calibration has no Fisher weights.
    """
    return _FisherSearch(context, metadata).run()


class _FisherSearch:
    def __init__(self, context: SearchContext, metadata: ScheduleMetadata) -> None:
        calibration = context.calibration
        self.context, self.metadata = context, metadata
        self.scores, self.levels, self.shapes = fisher_scores_of(calibration), calibration.levels, calibration.shapes
        self.costs = channel_costs(self.shapes, calibration.weights)
        self.read = weights_read(self.shapes, calibration.experts_per_token)
        found = find_linears(context.model)
        self.linears = {name: found[name] for name in self.shapes}

    def run(self) -> Schedule:
        corrections = self.context.recipe.fisher.corrections
        schedule = self._schedule()
        for done in range(_ROUNDS):
            self.context.report("thresholds", done, _ROUNDS)
            schedule = self._settled(schedule, self.scores.weights)
        visited = [schedule]
        for _ in range(corrections):
            weights = self._corrected(visited[-1])
            visited.append(self._settled(self._settled(visited[-1], weights), weights))
        return schedule if corrections == 0 else self._best(visited)

    def _schedule(self) -> Schedule:
        context = self.context
        if context.latency is None:
            sparsities = allocate(self.scores, self.levels, self.read, self.costs, context.target)
        else:
            sparsities = allocate_time(
                self.scores, self.levels, self.shapes, self.read, context.latency, context.target
            )
        return fisher_schedule(self.scores, self.levels, self.shapes, sparsities, self.metadata)

    def _settled(self, schedule: Schedule, weights: Mapping[str, Tensor]) -> Schedule:
        """λ found again by the scores that are measured while the model drops by a schedule."""
        context = self.context
        sample = first_tokens(context.samples, _TOKENS)
        run = partial(run_text, context.model, sample, context.batch_size, None)
        table = fisher_table(context.model, self.linears, weights, run, schedule=schedule)
        context.spent["thresholds"] += sample.numel()
        self.scores, self.levels = FisherScores(weights, table.thresholds), table.levels
        return self._schedule()

    def _corrected(self, schedule: Schedule) -> dict[str, Tensor]:
        """Fisher weights by what channels cost where the schedule drops them."""
        context, sample = self.context, first_tokens(self.context.samples, _CORRECTION_TOKENS)
        context.spent["costs"] += 5 * sample.numel()  # dense, sparse, its blocks again, and a backward pass of two

        def step(done: int, total: int) -> None:
            context.report("costs of what is dropped", min(done, total - 1), total)

        costs = dropped_costs(
            context.model, self.linears, schedule, sample, batch_size=context.batch_size, progress=step
        )
        return corrected_weights(
            self.scores.weights,
            {name: each.nats for name, each in costs.items()},
            {name: each.variances for name, each in costs.items()},
            {name: each.squares for name, each in costs.items()},
            context.recipe.fisher,
        )

    def _best(self, schedules: list[Schedule]) -> Schedule:
        """The one nearest to the dense model on a few windows of the validation tokens."""
        context = self.context
        meter = DivergenceMeter(context.model, self.linears, self.scores.weights)
        windows = context.tokens[np.random.default_rng(context.seed).permutation(len(context.tokens))[:_CHECKS]]
        nats = np.zeros(len(schedules))
        for number, window in enumerate(windows):
            context.report("comparing", number, len(windows))
            nats += [each.nats for each in meter.measure(window, [schedule.linears for schedule in schedules])]
        context.spent["trials"] += windows.numel() * (len(schedules) + 1)
        return schedules[int(np.argmin(nats))]

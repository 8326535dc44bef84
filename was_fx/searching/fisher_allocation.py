"""The recipe `fisher` on a model: λ found again on what the model's inputs are once it drops channels, and on request
weights corrected by what channels cost there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from was_fx.measure.calibrate import run_text
from was_fx.measure.fisher import dropped_costs, fisher_table
from was_fx.modules.linears import find_linears
from was_fx.schedules.experts import weights_read
from was_fx.schedules.files.calibration import Calibration
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
    return _FisherSearch(context, metadata).run().schedule


def corrected_calibration(context: SearchContext) -> Calibration:
    """The context's calibration with Fisher weights corrected at its target; they serve other targets nearly as well.

    Raises:
        ScheduleError: the calibration has no Fisher weights.
    """
    point = _FisherSearch(context, ScheduleMetadata()).run()
    return replace(context.calibration, fisher=point.scores)


@dataclass(frozen=True, eq=False)
class _Point:
    """A schedule, and the scores it was made by."""

    schedule: Schedule
    scores: FisherScores
    levels: Tensor


class _FisherSearch:
    def __init__(self, context: SearchContext, metadata: ScheduleMetadata) -> None:
        calibration = context.calibration
        self.context, self.metadata = context, metadata
        self.shapes = calibration.shapes
        self.costs = channel_costs(self.shapes, calibration.weights)
        self.read = weights_read(self.shapes, calibration.experts_per_token)
        found = find_linears(context.model)
        self.linears = {name: found[name] for name in self.shapes}

    def run(self) -> _Point:
        """At the context's target, after the recipe's corrections."""
        calibration, settings = self.context.calibration, self.context.recipe.fisher
        if settings.corrections and self.context.target < settings.at:
            higher = _FisherSearch(replace(self.context, target=settings.at), self.metadata).run()
            return self._settled_here(higher.scores, higher.levels)
        point = self._settled_here(fisher_scores_of(calibration), calibration.levels)
        for _ in range(settings.corrections):
            # How far to go differs from model to model, and too far loses more than there is to win.
            tried = [point, *(self._settled(point, weights) for weights in self._corrected(point))]
            best = self._best(tried)
            if best is point:
                break
            point = self._settled(best)
        return point

    def _settled_here(self, scores: FisherScores, levels: Tensor) -> _Point:
        """At the target, by scores that are measured elsewhere."""
        point = self._point(scores, levels)
        for done in range(_ROUNDS):
            self.context.report("thresholds", done, _ROUNDS)
            point = self._settled(point)
        return point

    def _point(self, scores: FisherScores, levels: Tensor) -> _Point:
        context = self.context
        if context.latency is None:
            sparsities = allocate(scores, levels, self.read, self.costs, context.target)
        else:
            sparsities = allocate_time(scores, levels, self.shapes, self.read, context.latency, context.target)
        return _Point(fisher_schedule(scores, levels, self.shapes, sparsities, self.metadata), scores, levels)

    def _settled(self, point: _Point, weights: Mapping[str, Tensor] | None = None) -> _Point:
        """λ found again by the scores that are measured while the model drops by a schedule, with its weights or other
        ones."""
        context, weights = self.context, weights or point.scores.weights
        sample = first_tokens(context.samples, _TOKENS)
        run = partial(run_text, context.model, sample, context.batch_size, None)
        table = fisher_table(context.model, self.linears, weights, run, schedule=point.schedule)
        context.spent["thresholds"] += sample.numel()
        return self._point(FisherScores(weights, table.thresholds), table.levels)

    def _corrected(self, point: _Point) -> list[dict[str, Tensor]]:
        """Fisher weights by what channels cost where the schedule drops them, for each step."""
        context, sample = self.context, first_tokens(self.context.samples, _CORRECTION_TOKENS)
        context.spent["costs"] += 5 * sample.numel()  # dense, sparse, its blocks again, and a backward pass of two

        def report(done: int, total: int) -> None:
            context.report("costs of what is dropped", min(done, total - 1), total)

        costs = dropped_costs(
            context.model, self.linears, point.schedule, sample, batch_size=context.batch_size, progress=report
        )
        settings = context.recipe.fisher
        return [corrected_weights(point.scores.weights, costs, step, settings.most) for step in settings.steps]

    def _best(self, points: list[_Point]) -> _Point:
        """The one nearest to the dense model on a few windows of the validation tokens."""
        context = self.context
        meter = DivergenceMeter(context.model, self.linears, points[0].scores.weights)
        windows = context.tokens[np.random.default_rng(context.seed).permutation(len(context.tokens))[:_CHECKS]]
        nats = np.zeros(len(points))
        for number, window in enumerate(windows):
            context.report("comparing", number, len(windows))
            nats += [each.nats for each in meter.measure(window, [point.schedule.linears for point in points])]
        context.spent["trials"] += windows.numel() * (len(points) + 1)
        return points[int(np.argmin(nats))]

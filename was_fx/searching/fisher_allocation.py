"""The recipe `fisher` on a model: λ found again on what the model's inputs are once it drops channels, with factors by
what groups of Linears cost there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import numpy as np

from was_fx.measure.calibrate import run_text
from was_fx.measure.fisher import fisher_table
from was_fx.modules.linears import find_linears
from was_fx.schedules.experts import weights_read
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.search.fisher import allocate, allocate_time, channel_costs, fisher_schedule, fisher_scores_of
from was_fx.schedules.search.fisher_factors import corrected, foreseen, linear_groups, raised
from was_fx.searching.divergence import DivergenceMeter
from was_fx.searching.search_context import SearchContext, first_tokens

# At high sparsity the first round still drifts, the third changes little.
_ROUNDS = 2
_TOKENS = 4096
# Windows that the points of the sweeps are compared on.
_CHECKS = 2


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
        self.factors = dict.fromkeys(self.shapes, 1.0)
        found = find_linears(context.model)
        self.linears = {name: found[name] for name in self.shapes}
        self.meter = DivergenceMeter(context.model, self.linears, self.scores.weights)

    def run(self) -> Schedule:
        context, settings = self.context, self.context.recipe.fisher
        schedule = self._schedule(self._sparsities())
        for done in range(_ROUNDS):
            context.report("thresholds", done, _ROUNDS)
            schedule = self._settled(schedule)
        if settings.sweeps == 0:
            return schedule
        visited = [schedule]
        windows = cycle(np.random.default_rng(context.seed).permutation(len(context.tokens)).tolist())
        for number in range(settings.sweeps):
            self._sweep(f"sweep {number}", visited[-1], list(islice(windows, settings.windows)))
            visited.append(self._settled(visited[-1]))
        # A sweep can lead astray: of all points the best, on windows of their own.
        found = self._divergences("check", [each.linears for each in visited], list(islice(windows, _CHECKS)))
        return visited[int(np.argmin(found))]

    def _sparsities(self) -> dict[str, float]:
        context, latency = self.context, self.context.latency
        if latency is None:
            return allocate(self.scores, self.levels, self.read, self.costs, context.target, self.factors)
        return allocate_time(self.scores, self.levels, self.shapes, self.read, latency, context.target, self.factors)

    def _schedule(self, sparsities: Mapping[str, float]) -> Schedule:
        return fisher_schedule(self.scores, self.levels, self.shapes, sparsities, self.metadata)

    def _linears(self, names: Iterable[str], sparsities: Mapping[str, float]) -> Mapping[str, LinearSchedule]:
        shapes = {name: self.shapes[name] for name in names}
        return fisher_schedule(self.scores, self.levels, shapes, sparsities, self.metadata).linears

    def _settled(self, schedule: Schedule) -> Schedule:
        """λ found again by the scores that are measured while the model drops by a schedule."""
        context = self.context
        sample = first_tokens(context.samples, _TOKENS)
        run = partial(run_text, context.model, sample, context.batch_size, None)
        table = fisher_table(context.model, self.linears, self.scores.weights, run, schedule=schedule)
        context.spent["thresholds"] += sample.numel()
        self.scores, self.levels = FisherScores(self.scores.weights, table.thresholds), table.levels
        return self._schedule(self._sparsities())

    def _sweep(self, key: str, schedule: Schedule, windows: list[int]) -> None:
        """Correct the factors by what groups cost beyond a schedule."""
        settings = self.context.recipe.fisher
        groups = linear_groups(self.shapes, settings.parts)
        start = {name: entry.sparsity for name, entry in schedule.linears.items()}
        points = [raised(start, set(names), settings.probe) for names in groups]
        ways = [dict(schedule.linears)]
        ways += [{**ways[0], **self._linears(names, each)} for names, each in zip(groups, points, strict=True)]
        base, *found = self._divergences(key, ways, windows)
        inputs = {name: columns for name, (_, columns) in self.shapes.items()}
        shares = {name: self.read[name] / math.prod(shape) for name, shape in self.shapes.items()}
        expected = [foreseen(self.scores, self.levels, shares, inputs, start, point) for point in points]
        rises = [each - base for each in found]
        self.factors = corrected(self.factors, groups, rises, expected, settings.step)

    def _divergences(self, key: str, ways: Sequence[Mapping[str, LinearSchedule]], windows: list[int]) -> list[float]:
        """Mean divergence by entries of all Linears, nats per token, on windows of the validation tokens."""
        context = self.context
        record = context.log.recorded(key, windows)
        if record is None:
            found = np.zeros(len(ways))
            for number, window in enumerate(windows):
                for way, each in enumerate(self.meter.measure(context.tokens[window], ways)):
                    context.report(f"divergences, {key}", number * len(ways) + way, len(windows) * len(ways))
                    found[way] += each.nats
            tokens = len(windows) * (len(ways) + 1) * context.tokens.shape[1]
            record = context.log.add(key, windows, {"divergences": (found / len(windows)).tolist(), "tokens": tokens})
        context.spent["trials"] += record["tokens"]
        return list(record["divergences"])

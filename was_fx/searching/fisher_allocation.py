"""The recipe `fisher` on a model: λ found again on what the model's inputs are once it drops channels."""

from functools import partial

from was_fx.measure.calibrate import run_text
from was_fx.measure.fisher import fisher_table
from was_fx.modules.linears import find_linears
from was_fx.schedules.experts import weights_read
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.search.fisher import allocate, allocate_time, channel_costs, fisher_schedule, fisher_scores_of
from was_fx.searching.search_context import SearchContext, first_tokens

# At high sparsity the first round still drifts, the third changes little.
_ROUNDS = 2
_TOKENS = 4096


def search_fisher(context: SearchContext, metadata: ScheduleMetadata) -> Schedule:
    """The schedule at the context's target.

    Raises:
        ScheduleError: the calibration has no Fisher weights.
    """
    calibration = context.calibration
    scores, levels, shapes = fisher_scores_of(calibration), calibration.levels, calibration.shapes
    costs, read = channel_costs(shapes, calibration.weights), weights_read(shapes, calibration.experts_per_token)

    def allocated() -> Schedule:
        if context.latency is None:
            sparsities = allocate(scores, levels, read, costs, context.target)
        else:
            sparsities = allocate_time(scores, levels, shapes, read, context.latency, context.target)
        return fisher_schedule(scores, levels, shapes, sparsities, metadata)

    schedule = allocated()
    found = find_linears(context.model)
    linears = {name: found[name] for name in shapes}
    sample = first_tokens(context.samples, _TOKENS)
    for done in range(_ROUNDS):
        context.report("thresholds", done, _ROUNDS)
        run = partial(run_text, context.model, sample, context.batch_size, None)
        table = fisher_table(context.model, linears, scores.weights, run, schedule=schedule)
        context.spent["thresholds"] += sample.numel()
        scores, levels = FisherScores(scores.weights, table.thresholds), table.levels
        schedule = allocated()
    return schedule

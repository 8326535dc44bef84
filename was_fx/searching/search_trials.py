"""Trials of a search: in this process or on workers, and the divergence from the dense model at given sparsities."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from was_fx.schedules.experts import spread
from was_fx.schedules.files.schedule import ScheduleMetadata
from was_fx.schedules.search.exact import Divergences
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.schedules.search.trial_runner import Evaluate, EvaluateSeveral, Task, TrialRunner
from was_fx.searching.search_context import SearchContext
from was_fx.searching.trial_evaluation import TrialEvaluator
from was_fx.searching.workers import RemoteEvaluator, checkpoint_of
from was_fx.sparse.sparsify import densify, prompts_treated, sparsify


@contextmanager
def running(context: SearchContext, table: ThresholdTable) -> Iterator[TrialRunner]:
    """What runs trials: this process with the model sparsified meanwhile, or workers with models of their own."""
    metadata = ScheduleMetadata(fingerprint=context.calibration.fingerprint)
    schedule = table.schedule(dict.fromkeys(context.shapes, context.target), metadata)
    model, size = context.model, context.batch_size
    evaluate: Evaluate
    several: EvaluateSeveral | None = None
    if context.workers is None:
        sparsify(model, schedule)
        evaluate = evaluator = TrialEvaluator(model, schedule, context.tokens, batch_size=size)
        several = evaluator.several
    else:
        parameter = next(model.parameters())
        evaluate = RemoteEvaluator(
            checkpoint=checkpoint_of(model),
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            schedule=schedule,
            tokens=tuple(map(tuple, context.tokens.tolist())),
            batch_size=size,
        )
    try:
        # What else looks at the model meanwhile sees the dense one.
        with (
            prompts_treated(model, "dense"),
            TrialRunner(evaluate, context.log, context.workers, several=several) as runner,
        ):
            yield runner
            context.spent["trials"] += runner.tokens
    finally:
        if context.workers is None:
            densify(model)


def divergences(
    context: SearchContext, table: ThresholdTable, runner: TrialRunner, label: str, window: int
) -> Divergences:
    """KL(dense ‖ sparse), nats per token, of the model with given sparsities, on one window of validation tokens."""
    length = min(context.recipe.exact.tokens, context.tokens.shape[1])
    context.spent["trials"] += length  # the dense predictions

    def measure(points: Sequence[Mapping[str, float]]) -> list[float]:
        tasks = [
            Task(
                key=f"{label} probe {number}",
                inputs={"linears": entries(table, point), "window": window, "length": length},
                notes={"window": window, "sparsities": [round(s, 6) for s in point.values()]},
            )
            for number, point in enumerate(points)
        ]
        return [result["divergence"] for result in runner.run(tasks)]

    return measure


def entries(table: ThresholdTable, sparsities: Mapping[str, float]) -> dict[str, list[float]]:
    """[sparsity, τ, α] by qualified name, of sparsities by name or group."""
    found = {name: table.linear(name, sparsity) for name, sparsity in spread(sparsities, table.shapes).items()}
    return {name: [entry.sparsity, entry.threshold, entry.exponent] for name, entry in found.items()}

"""`search`: the sparsity of every Linear, by a recipe."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from was_fx.modules.linears import find_linears
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import spread
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.fingerprint import differences
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata
from was_fx.schedules.projection import check_budget
from was_fx.schedules.search.block_search import SearchProgress, ramps
from was_fx.schedules.search.latency import LatencyTable
from was_fx.schedules.search.level_table import LevelTable
from was_fx.schedules.search.recipes import Recipe, find_recipe
from was_fx.schedules.search.trial_log import TrialLog
from was_fx.searching import exact_allocation
from was_fx.searching.block_allocation import BlockAllocation
from was_fx.searching.block_level_search import history, search_blocks
from was_fx.searching.fisher_allocation import corrected_calibration, search_fisher
from was_fx.searching.search_context import SearchContext
from was_fx.searching.search_trials import running
from was_fx.sparse.state import model_fingerprint, sparse_state, warn_of_other_formats
from was_fx.version import __version__


def search(
    model: nn.Module,
    calibration: Calibration,
    *,
    tokens: Tensor,
    target: float = 0.5,
    recipe: str | Recipe = "was",
    trials: int | None = None,
    seed: int = 0,
    calibration_tokens: Tensor | None = None,
    include_head: bool = False,
    latency: LatencyTable | None = None,
    start: Schedule | None = None,
    level_tables: dict[str, LevelTable] | None = None,
    paper_exact: bool = False,
    log: str | Path | None = None,
    resume: bool = False,
    workers: Callable[[], Executor] | None = None,
    batch: int = 1,
    batch_size: int = 1,
    text: str = "",
    progress: SearchProgress | None = None,
) -> Schedule:
    """Find the sparsity of every Linear so that the model sparsity is the target and the loss is low.

    The objective of a trial is the loss on `tokens` through the sparsified model, all but the first 1 % of each
    window sparse. Thresholds are measured while the model drops what the target asks for, and in the end while it
    drops what was found, so what is nominal is also what is realised. The model is dense again afterwards.

    Args:
        model: the dense model that was calibrated, on its device and in its dtype.
        calibration: of its recipe's score: WAS's |x|·‖W‖₁ for "was", TEAL's |x| for "teal", and so on; of any, with
            Fisher weights, for "fisher".
        tokens: LongTensor [n, seq], validation windows; never a test text.
        target: the model sparsity, above 0 and below 1.
        recipe: "uniform", "teal", "wina", "was", "wisparse", "exact", "fisher", or a `Recipe`.
        trials: how many over blocks; by default the recipe's. For "exact", trials that refine its answer.
        seed: of the optimiser, and of the windows that "exact" measures on.
        calibration_tokens: LongTensor [n, seq] to measure thresholds and block errors on; by default `tokens`.
        include_head: schedule the head too; only for "exact" and "uniform".
        latency: save what the uniform schedule at the target would save in time, by these measured curves, instead of
            in bytes; only for "exact" and "fisher". The nominal sparsity is then another one than the target.
        start: a schedule whose block levels are tried first.
        level_tables: greedy tables by block, of an earlier search with this calibration and these greedy settings at
            whatever target; those that are missing are made in full and added.
        paper_exact: as the paper's released code; see `find_recipe`.
        log: file for a JSON line per trial.
        resume: continue the log of the same search.
        workers: opens an executor to run trials on; see `was_fx.searching.workers`. The model must come from
            a checkpoint.
        batch: trials asked for at once. It belongs to the search: other batches try other points.
        batch_size: windows per forward pass.
        text: what the validation tokens are, for the record.
        progress: called with a `SearchState` after each batch of trials.

    Returns:
        The best schedule found. Its metadata tells the settings, the trials' best values, the tokens spent.

    Raises:
        ScheduleError: the calibration is of another model or score, the log of another search, or workers keep dying.
        ValueError: the model is sparsified, or the target, the bounds or another argument is out of range.
        FileExistsError: there is a log and `resume` is not set.
    """
    chosen = find_recipe(recipe, paper_exact=paper_exact) if isinstance(recipe, str) else recipe
    samples = tokens if calibration_tokens is None else calibration_tokens
    trials = chosen.trials if trials is None else trials
    context = SearchContext(
        model=model,
        calibration=calibration,
        recipe=chosen,
        target=target,
        trials=trials,
        seed=seed,
        tokens=tokens,
        samples=samples,
        head=include_head,
        latency=latency,
        start=start,
        level_tables=level_tables,
        workers=workers,
        batch=batch,
        batch_size=batch_size,
        progress=progress,
    )
    _check(context)
    settings = {
        "recipe": chosen.name,
        "recipe_settings": asdict(chosen),
        "target": target,
        "trials": trials,
        "seed": seed,
        "batch": batch,
        "score": str(calibration.score),
        "head": include_head,
        "cost": "bytes" if latency is None else "latency",
        "tokens": [*tokens.shape, tokens_digest(tokens)],
        "calibration_tokens": [*samples.shape, tokens_digest(samples)],
        "start": None if start is None else {name: entry.sparsity for name, entry in start.linears.items()},
        "model": calibration.fingerprint,
        "was_fx": __version__,
        **({"weights": dict(calibration.weights)} if calibration.weights else {}),
    }
    context.log = TrialLog(log, settings, resume=resume)
    return _run(context, {key: settings[key] for key in ("trials", "batch", "cost", "tokens")} | {"text": text})


def correct_fisher(
    model: nn.Module,
    calibration: Calibration,
    *,
    tokens: Tensor,
    target: float = 0.5,
    seed: int = 0,
    batch_size: int = 1,
    progress: SearchProgress | None = None,
) -> Calibration:
    """The calibration with Fisher weights corrected by what channels cost where the model drops them, at one target.

    They serve `fisher` at other targets nearly as well as weights corrected there. The recipe `fisher` corrects by
    itself.

    Args:
        model: the dense model that was calibrated, on its device and in its dtype.
        calibration: with Fisher weights, of `calibrate(..., fisher=True)`.
        tokens: LongTensor [n, seq], may be those that calibrated. Every fourth sequence, of eight or more, decides how
            far the correction goes; the others give it.
        target: the model sparsity, from 0.5 to below 1; for a lower one they are corrected at 0.5.
        seed: of the sequences that decide.
        batch_size: sequences per forward pass.
        progress: called with a `SearchState` at every step.

    Returns:
        The same calibration with other Fisher weights, and thresholds for them.

    Raises:
        ScheduleError: the calibration is of another model, or has no Fisher weights; or losses are not finite.
        ValueError: the model is sparsified, or an argument is out of range.
    """
    decides = torch.arange(len(tokens)) % 4 == 3
    gives, judged = (tokens[~decides], tokens[decides]) if len(tokens) >= 8 else (tokens, tokens)
    context = SearchContext(
        model=model,
        calibration=calibration,
        recipe=find_recipe("fisher"),
        target=target,
        trials=0,
        seed=seed,
        tokens=judged,
        samples=gives,
        head=False,
        latency=None,
        start=None,
        level_tables=None,
        workers=None,
        batch=1,
        batch_size=batch_size,
        progress=progress,
    )
    _check(context)
    return corrected_calibration(context)


def _run(context: SearchContext, settings: Mapping[str, Any]) -> Schedule:
    """Thresholds, allocation inside blocks and over them, final thresholds; `settings` go into the metadata."""
    recipe, target, blocks = context.recipe, context.target, context.blocks
    margin, limit = recipe.margin if recipe.searches else 1.0, recipe.greedy.limit
    bounds = max(target - margin, 0.0), min(target + margin, limit)
    if recipe.over == "fisher":
        schedule = search_fisher(context, _metadata(context, settings, ()))
        return schedule.replace({}, history={"tokens": dict(context.spent)})
    check_budget(target, [float(block.size) for block in blocks], *bounds)
    inside = BlockAllocation(context)
    table = context.dense_table(inside.exponents() if recipe.score is None else None)
    found: dict[str, Any] = {}
    uniform = np.full(len(blocks), target)
    if recipe.over == "exact":
        with running(context, table) as runner:
            table, sparsities, found = exact_allocation.allocate(context, table, runner)
    elif recipe.searches:
        expand = inside.expansion(table)
        table = context.table_at(table, expand(uniform))
        with running(context, table) as runner:
            result = search_blocks(context, table, expand, runner, ramps)
        sparsities, found = dict(expand(result.levels)), history(result)
    else:
        sparsities = dict(inside.expansion(table)(uniform))
    excluded = tuple(name for name in context.calibration.shapes if not spread(sparsities, [name]))
    schedule = context.final(table.schedule(sparsities, _metadata(context, settings, excluded)))
    return schedule.replace({}, history={**found, "tokens": dict(context.spent)})


def _metadata(context: SearchContext, settings: Mapping[str, Any], excluded: tuple[str, ...]) -> ScheduleMetadata:
    return context.calibration.metadata(
        context.recipe.name,
        context.target,
        context.calibration.shapes,
        excluded=excluded,
        seed=context.seed,
        search=dict(settings),
    )


def _check(context: SearchContext) -> None:
    model, calibration, recipe = context.model, context.calibration, context.recipe
    target, trials, batch = context.target, context.trials, context.batch
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified; a search needs the dense one: was_fx.densify(model) first")
    check_tokens(model, context.tokens)
    if not 0 < target < 1:
        raise ValueError(f"the target sparsity must be above 0 and below 1, found {target!r}; give for example 0.5")
    if batch < 1 or trials < (1 if recipe.searches else 0):
        raise ValueError(f"a search needs at least one trial at a time and in all, found {trials} and batch {batch}")
    if recipe.score is not None and recipe.score != calibration.score and recipe.over not in ("exact", "fisher"):
        raise ScheduleError(
            f"the recipe {recipe.name!r} scores by {recipe.score}, but the calibration measured {calibration.score}",
            remedy=f"Calibrate with the score {recipe.score}, or choose the recipe of this calibration.",
        )
    if context.head and recipe.over not in ("exact", "uniform"):
        raise ValueError(f"the head is for the recipes 'exact' and 'uniform', not {recipe.name!r}")
    if context.latency is not None and recipe.over not in ("exact", "fisher", "uniform"):
        raise ValueError(f"measured latencies are for the recipes 'exact' and 'fisher', not {recipe.name!r}")
    found = model_fingerprint(model, find_linears(model))
    other = differences(calibration.fingerprint, found) if calibration.fingerprint else []
    if other:
        raise ScheduleError("the calibration is of another model", other, "Calibrate this model first.")
    warn_of_other_formats(model, calibration.weights, "the calibration")
    check_tokens(model, context.samples)


def tokens_digest(tokens: Tensor) -> str:
    """A short hash of token ids, for a log."""
    data: Any = tokens.to("cpu", torch.int64).contiguous().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]

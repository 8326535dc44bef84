"""A search over block levels: ask, evaluate, tell, and keep the best feasible point of our own archive."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.projection import Vector
from was_fx.schedules.search.block_space import BlockSpace
from was_fx.schedules.search.optimizers import Optimizer
from was_fx.schedules.search.racing import estimate
from was_fx.schedules.search.trial_runner import Task, TrialRunner


@dataclass(frozen=True, eq=False)
class SearchState:
    """How far a search is.

    Attributes:
        done: finished trials.
        total: trials to make.
        best: loss of the incumbent, nats per token; infinite before the first trial.
        levels: levels of the incumbent by block, from 0 to 1; empty before the first trial.
        optimizer_seconds: time inside the optimiser, in seconds.
        objective_seconds: time waiting for trials, in seconds.
        seconds_left: estimate from the trials of this run, None before there are any.
        phase: what is being done, in words.
    """

    done: int
    total: int
    best: float = float("inf")
    levels: tuple[float, ...] = ()
    optimizer_seconds: float = 0.0
    objective_seconds: float = 0.0
    seconds_left: float | None = None
    phase: str = "trials"


@dataclass(frozen=True, eq=False)
class BlockResult:
    """The best levels found.

    Attributes:
        levels: by block, [D], float64.
        losses: best loss so far after each trial, nats per token.
        stopped: trials that were stopped early.
    """

    levels: Vector
    losses: list[float]
    stopped: int


SearchProgress = Callable[[SearchState], None]


def search_levels(
    space: BlockSpace,
    optimizer: Optimizer,
    runner: TrialRunner,
    entries: Callable[[Vector], Mapping[str, Any]],
    *,
    trials: int,
    starts: Sequence[Vector] = (),
    batch: int = 1,
    progress: SearchProgress | None = None,
) -> BlockResult:
    """Minimise the loss over block levels.

    Args:
        space: what points mean.
        optimizer: of the space's dimension.
        runner: evaluates {"linears", "incumbent"} to {"losses", "realised", "tokens", "seconds"}, where the losses
            (nats per token) are those of the windows it saw: fewer than all if it gave up.
        entries: what the runner is given as "linears" for block levels, [D].
        trials: how many, the starts included; at least 1.
        starts: levels to try first, [D] each.
        batch: trials asked for at once, to run in parallel. It changes which points are tried.
        progress: called after every batch.

    Raises:
        ScheduleError: a loss is not finite, workers keep dying, or the log is of other trials.
    """
    began, resumed = time.perf_counter(), runner.log.finished
    for start in reversed(list(starts)[:trials]):  # Nevergrad gives the suggestions last in first out
        optimizer.suggest(space.encode(start))
    best: dict[str, Any] | None = None
    history: list[float] = []
    stopped = 0
    while len(history) < trials:
        asked = [optimizer.ask() for _ in range(min(batch, trials - len(history)))]
        levels = [space.decode(point) for _, point in asked]
        incumbent = best["losses"] if best is not None else []
        tasks = [
            Task(
                key=f"trial {len(history) + offset}",
                inputs={"linears": entries(each), "incumbent": incumbent},
                notes={"levels": each.tolist(), "point": point.tolist()},
            )
            for offset, (each, (_, point)) in enumerate(zip(levels, asked, strict=True))
        ]
        for result, (candidate, _) in zip(runner.run(tasks), asked, strict=True):
            value = estimate(result["losses"], incumbent)
            if not np.isfinite(value):
                raise ScheduleError(f"{result['trial']}: the loss is {value}; check the model's dtype and the text")
            optimizer.tell(candidate, value)
            whole = len(incumbent) <= len(result["losses"])
            stopped += not whole
            if whole and (best is None or value < best["value"]):
                best = {**result, "value": value}
            history.append(best["value"] if best else value)
        if progress is not None and best is not None:
            done = len(history)
            fresh = max(done - resumed, 1)
            left = (time.perf_counter() - began) / fresh * (trials - done)
            shape = tuple(best["levels"])
            progress(SearchState(done, trials, best["value"], shape, optimizer.seconds, runner.seconds, left))
    assert best is not None
    return BlockResult(np.array(best["levels"]), history, stopped)


def ramps(space: BlockSpace) -> list[Vector]:
    """Starting points, [D] each: the space's center, and levels that rise and that fall by half the bounds' width."""
    depth = np.linspace(-0.5, 0.5, len(space.weights)) * (space.upper - space.lower)
    return [space.center, space.center + depth, space.center - depth]

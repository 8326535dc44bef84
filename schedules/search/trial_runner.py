"""Running trials: from the log if they are there, otherwise here or on workers that may die."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.search.trial_log import TrialLog

Evaluate = Callable[[Mapping[str, Any]], dict[str, Any]]
# The results of several, in their order, each as soon as it is there.
EvaluateSeveral = Callable[[Sequence[Mapping[str, Any]]], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """One trial.

    Attributes:
        key: its name in the log.
        inputs: what `Evaluate` is given.
        notes: JSON values that tell this trial from others; written beside its result, and compared on resuming.
    """

    key: str
    inputs: Mapping[str, Any]
    notes: Mapping[str, Any]


class TrialRunner:
    """Evaluates tasks and logs each result as soon as it is there.

    Args:
        evaluate: from a task's inputs to a JSON object with `tokens`, the forward-pass tokens it took; with an executor
            it is pickled.
        log: where finished trials are.
        make_executor: opens the workers, and opens them anew when one died; None evaluates in this process.
        attempts: how often workers may die before the search gives up.
        several: evaluates trials that are asked for together, in this process; by default `evaluate`, one by one.

    Attributes:
        tokens: forward-pass tokens of all trials so far, those read from the log included.
        seconds: time spent waiting for trials in this process.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        log: TrialLog,
        make_executor: Callable[[], Executor] | None = None,
        *,
        attempts: int = 3,
        several: EvaluateSeveral | None = None,
    ) -> None:
        self._several = several or partial(map, evaluate)
        self._evaluate, self.log, self._make, self._attempts = evaluate, log, make_executor, attempts
        self._executor: Executor | None = None
        self.tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> "TrialRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self._close(wait=True)

    def run(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """The results of the tasks, in their order.

        Raises:
            ScheduleError: workers died too often; finished trials are in the log.
        """
        start = time.perf_counter()
        results = {task.key: found for task in tasks if (found := self.log.recorded(task.key, task.notes))}
        missing = [task for task in tasks if task.key not in results]
        if self._make is None or not missing:
            for task, result in zip(missing, self._several([task.inputs for task in missing]), strict=True):
                results[task.key] = self._record(task, result)
        else:
            self._run_on_workers(missing, results)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(int(result["tokens"]) for result in results.values())
        return [results[task.key] for task in tasks]

    def _run_on_workers(self, missing: list[Task], results: dict[str, dict[str, Any]]) -> None:
        for _ in range(self._attempts):
            left = [task for task in missing if task.key not in results]
            try:
                self._submit(left, results)
                return
            except BrokenExecutor:
                self._close(wait=False)
        raise ScheduleError(
            f"workers died {self._attempts} times, last in one of the trials "
            f"{', '.join(task.key for task in missing if task.key not in results)}",
            remedy="They may lack memory: use fewer workers or shorter batches. Finished trials are kept; resume.",
        )

    def _submit(self, tasks: list[Task], results: dict[str, dict[str, Any]]) -> None:
        assert self._make is not None
        if self._executor is None:
            self._executor = self._make()
        futures = {self._executor.submit(self._evaluate, dict(task.inputs)): task for task in tasks}
        broken: BrokenExecutor | None = None
        for future in as_completed(futures):
            try:
                results[futures[future].key] = self._record(futures[future], future.result())
            except BrokenExecutor as error:
                broken = error  # the others may have finished before
        if broken is not None:
            raise broken

    def _record(self, task: Task, result: Mapping[str, Any]) -> dict[str, Any]:
        return self.log.add(task.key, task.notes, {**task.notes, **result})

    def _close(self, *, wait: bool) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=wait, cancel_futures=True)
            self._executor = None

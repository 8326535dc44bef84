"""Running trials: the log first, workers in parallel, and workers that die."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.search.trial_log import TrialLog
from was_fx.schedules.search.trial_runner import Task, TrialRunner


def square(inputs):
    return {"value": inputs["x"] ** 2, "tokens": 10}


def die_once(inputs):
    """Kills its own process the first time it sees x = 2."""
    marker = Path(inputs["marker"])
    if inputs["x"] == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(inputs)


def die(inputs):
    os.kill(os.getpid(), signal.SIGKILL)


def processes():
    return ProcessPoolExecutor(2, mp_context=get_context("fork"))


def tasks(count, **inputs):
    return [Task(f"trial {x}", {"x": x, **inputs}, {"x": x}) for x in range(count)]


@pytest.mark.parametrize("make", [None, lambda: ThreadPoolExecutor(2)])
def test_results_come_in_order_and_are_logged(make):
    log = TrialLog(None, {})
    with TrialRunner(square, log, make) as runner:
        assert [result["value"] for result in runner.run(tasks(4))] == [0, 1, 4, 9]
    assert log.finished == 4
    assert runner.tokens == 40


def test_what_is_in_the_log_is_not_evaluated_again():
    log = TrialLog(None, {})
    for task in tasks(3):
        log.add(task.key, task.notes, {"value": -1, "tokens": 1})
    assert [result["value"] for result in TrialRunner(square, log).run(tasks(4))] == [-1, -1, -1, 9]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_dies_is_replaced_and_no_result_is_lost(tmp_path):
    log = TrialLog(tmp_path / "log.jsonl", {})
    with TrialRunner(die_once, log, processes) as runner:
        results = runner.run(tasks(5, marker=str(tmp_path / "died")))
    assert [result["value"] for result in results] == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()
    assert TrialLog(tmp_path / "log.jsonl", {}, resume=True).finished == 5


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_keep_dying_end_the_search_with_a_remedy():
    with (
        TrialRunner(die, TrialLog(None, {}), processes, attempts=2) as runner,
        pytest.raises(ScheduleError, match=r"died 2 times.*trial 0[\s\S]*resume"),
    ):
        runner.run(tasks(1))


def test_an_error_of_a_trial_is_raised_after_the_others_were_logged(tmp_path):
    log = TrialLog(tmp_path / "log.jsonl", {})
    bad = [*tasks(2), Task("trial 2", {}, {})]
    with TrialRunner(square, log, lambda: ThreadPoolExecutor(1)) as runner, pytest.raises(KeyError):
        runner.run(bad)
    assert log.finished == 2

"""The search over block levels: its space, its optimisers, its archive."""

import numpy as np
import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.search.block_search import ramps, search_levels
from was_fx.schedules.search.block_space import block_space
from was_fx.schedules.search.optimizers import Optimizer
from was_fx.schedules.search.trial_log import TrialLog
from was_fx.schedules.search.trial_runner import TrialRunner

BLOCKS = 12
COSTS = np.exp(1.2 * np.cos(np.linspace(0, 2 * np.pi, BLOCKS)) + np.random.default_rng(0).normal(0, 0.3, BLOCKS))
COSTS /= COSTS.sum()


def evaluate(inputs):
    """Losses of four windows of a model with convex costs by block."""
    levels = np.array(inputs["linears"])
    loss = float((COSTS * levels**3 / (1.02 - levels)).sum())
    losses = [loss * share for share in (0.9, 1.0, 1.1, 1.05)]
    seen = 3 if inputs["incumbent"] and loss > 1.3 * np.mean(inputs["incumbent"]) else 4
    return {"losses": losses[:seen], "tokens": seen, "realised": 0.5, "seconds": 0.0}


def run(name, seed=0, trials=30, dimension=6, log=None, batch=1, **space_settings):
    space = block_space([1.0] * BLOCKS, 0.6, 0.15, dimension=dimension, **space_settings)
    runner = TrialRunner(evaluate, log or TrialLog(None, {}))
    optimizer = Optimizer(name, space.dimension, trials, seed)
    starts = ramps(space)
    result = search_levels(space, optimizer, runner, list, trials=trials, starts=starts, batch=batch)
    return space, result


def test_the_first_trial_is_uniform_and_starts_come_in_order():
    log = TrialLog(None, {})
    run("random", trials=4, log=log)
    first = log._finished["trial 0"]["levels"]
    np.testing.assert_allclose(first, 0.6, atol=1e-9)
    assert np.all(np.diff(log._finished["trial 1"]["levels"]) > 0)
    assert np.all(np.diff(log._finished["trial 2"]["levels"]) < 0)


@pytest.mark.parametrize("name", ["bayesian", "evolutionary", "random"])
def test_every_trial_meets_budget_and_bounds_and_the_best_is_returned(name):
    log = TrialLog(None, {})
    space, result = run(name, trials=9, log=log)
    records = [log._finished[f"trial {at}"] for at in range(9)]
    for record in records:
        levels = np.array(record["levels"])
        assert abs(levels.mean() - 0.6) < 1e-9
        assert (np.abs(levels - 0.6) <= 0.15 + 1e-12).all()
    whole = [np.mean(record["losses"]) for record in records if len(record["losses"]) == 4]
    assert result.losses[-1] == pytest.approx(min(whole))
    assert result.losses == sorted(result.losses, reverse=True)
    assert space.dimension == 6


def test_the_same_seed_repeats_and_another_differs():
    assert run("bayesian", trials=8)[1].losses == run("bayesian", trials=8)[1].losses
    one, two = TrialLog(None, {}), TrialLog(None, {})
    run("bayesian", trials=6, log=one)
    run("bayesian", trials=6, log=two, seed=1)
    assert one._finished["trial 5"]["levels"] != two._finished["trial 5"]["levels"]


def test_a_resumed_search_ends_as_an_uninterrupted_one(tmp_path):
    whole = TrialLog(tmp_path / "whole.jsonl", {})
    expected = run("bayesian", trials=8, log=whole)[1]
    part = tmp_path / "part.jsonl"
    part.write_text("".join((tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)[:5]))
    found = run("bayesian", trials=8, log=TrialLog(part, {}, resume=True))[1]
    assert found.losses == expected.losses
    assert part.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_batches_ask_for_distinct_points():
    log = TrialLog(None, {})
    run("bayesian", trials=9, batch=3, log=log)
    points = {tuple(np.round(log._finished[f"trial {at}"]["point"], 9)) for at in range(9)}
    assert len(points) == 9


def test_monotone_searches_never_fall_over_depth():
    log = TrialLog(None, {})
    run("evolutionary", trials=8, log=log, monotone=True)
    for record in log._finished.values():
        assert (np.diff(record["levels"]) >= -1e-12).all()


def test_bayesian_beats_random_and_uniform_at_equal_trials():
    results = {name: [run(name, seed, trials=20)[1] for seed in range(2)] for name in ("bayesian", "random")}
    bayesian, random = (np.mean([each.losses[-1] for each in results[name]]) for name in ("bayesian", "random"))
    uniform = results["random"][0].losses[0]
    assert bayesian < random < uniform


def test_a_loss_that_is_not_finite_ends_the_search():
    space = block_space([1.0] * 3, 0.5, 0.1)
    runner = TrialRunner(lambda inputs: {"losses": [float("inf")] * 4, "tokens": 1}, _NoLog())
    with pytest.raises(ScheduleError, match="trial 0: the loss is inf"):
        search_levels(space, Optimizer("random", 3, 2, 0), runner, list, trials=2)


class _NoLog(TrialLog):
    def __init__(self):
        super().__init__(None, {})

    def add(self, key, task, result):
        return {"trial": key, **result}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0.0}, "margin must be"),
        ({"margin": 0.1, "target": 0.97}, "bounds"),
        ({"margin": 0.1, "target": 1.5}, "above 0 and below 1"),
    ],
)
def test_bad_bounds_are_refused(settings, message):
    arguments = {"weights": [1.0] * 3, "target": 0.5, **settings}
    with pytest.raises(ValueError, match=message):
        block_space(**arguments)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="bayesian, evolutionary, random"):
        Optimizer("annealing", 2, 10, 0)

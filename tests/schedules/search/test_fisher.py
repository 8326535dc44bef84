"""One λ for all Linears: budgets, thresholds, costs."""

import dataclasses
import math

import pytest
import torch

import was_fx
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.score import Score
from was_fx.schedules.search.fisher import allocate, channel_costs
from was_fx.schedules.search.latency import LatencyTable

LEVELS = torch.arange(1000) / 1000


def calibration(scales, shapes, fisher=True):
    """Scores spread evenly from 0 to a scale of each Linear's own; Fisher weights of 2 everywhere."""
    thresholds = {name: LEVELS * scale for name, scale in scales.items()}
    weights = {name: torch.full((shapes[name][1],), 2.0) for name in shapes}
    scores = FisherScores(weights, thresholds) if fisher else None
    return Calibration(Score(), LEVELS, thresholds, shapes, tokens=1, text="", fisher=scores)


@pytest.mark.core
@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.8, 0.95])
def test_the_target_is_met_and_one_threshold_serves_all(target):
    shapes = {"a": (8, 16), "b": (8, 32), "c": (32, 16)}
    made = was_fx.fisher(calibration({"a": 1.0, "b": 3.0, "c": 0.5}, shapes), target)
    assert made.sparsity == pytest.approx(target, abs=1e-7)
    costs = {name: n for name, (n, _) in shapes.items()}
    roots = {
        name: entry.threshold / math.sqrt(costs[name])
        for name, entry in made.linears.items()
        if 0 < entry.sparsity < 0.998
    }
    assert len(roots) >= (target > 0)
    assert all(root == pytest.approx(next(iter(roots.values())), rel=1e-3) for root in roots.values())


def test_thresholds_are_divided_by_the_weights_of_channels():
    shapes = {"a": (8, 16)}
    given = calibration({"a": 1.0}, shapes)
    weights = {"a": torch.linspace(0.0, 4.0, 16)}
    made = was_fx.fisher(dataclasses.replace(given, fisher=FisherScores(weights, given.fisher.thresholds)), 0.5)
    entry = made.linears["a"]
    assert entry.threshold == pytest.approx(0.5, rel=1e-3)
    assert entry.channel_threshold[0] == math.inf  # it does not move the loss
    torch.testing.assert_close(entry.channel_threshold[1:], entry.threshold / weights["a"][1:])


def test_a_linear_that_matters_less_is_sparser():
    made = was_fx.fisher(calibration({"a": 1.0, "b": 4.0}, {"a": (8, 16), "b": (8, 16)}), 0.4)
    assert made.linears["a"].sparsity == pytest.approx(4 * made.linears["b"].sparsity, rel=1e-2)


def test_channels_that_save_more_bytes_are_dropped_sooner():
    shapes = {"a": (8, 16), "b": (32, 16)}
    made = was_fx.fisher(calibration({"a": 1.0, "b": 1.0}, shapes), 0.3)
    assert made.linears["b"].sparsity == pytest.approx(2 * made.linears["a"].sparsity, rel=1e-2)
    assert channel_costs(shapes, {"b": "int4-32"}) == {"a": 16.0, "b": 16.0}


def test_multipliers_move_sparsity_between_linears():
    given = calibration({"a": 1.0, "b": 1.0}, {"a": (8, 16), "b": (8, 16)})
    costs = channel_costs(given.shapes, None)
    found = allocate(given.fisher, LEVELS, {"a": 128, "b": 128}, costs, 0.3, {"a": 4.0})
    assert found["a"] == pytest.approx(2 * found["b"], rel=1e-2)
    assert found["a"] + found["b"] == pytest.approx(0.6, abs=1e-9)


def test_equal_scores_that_overshoot_are_taken_back():
    given = calibration({"a": 0.0, "b": 0.0}, {"a": (8, 16), "b": (8, 16)})
    assert was_fx.fisher(given, 0.3).sparsity == pytest.approx(0.3, abs=1e-7)


@pytest.mark.parametrize("target", [-0.1, 1.0, math.nan])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match=r"target sparsity must be from 0 to 0\.999"):
        was_fx.fisher(calibration({"a": 1.0}, {"a": (8, 16)}), target)


def test_a_calibration_without_fisher_weights_says_what_to_do():
    with pytest.raises(ScheduleError, match=r"no Fisher weights[\s\S]*was calibrate --fisher"):
        was_fx.fisher(calibration({"a": 1.0}, {"a": (8, 16)}, fisher=False), 0.5)


@pytest.mark.parametrize(
    ("weights", "thresholds", "message"),
    [
        ({}, {"a": LEVELS}, "a has no Fisher weights"),
        ({"a": torch.ones(3)}, {"a": LEVELS}, r"Fisher weights are \[3\]"),
        ({"a": torch.full((16,), torch.nan)}, {"a": LEVELS}, "hold NaN"),
        ({"a": torch.ones(16)}, {"a": LEVELS.flip(0)}, "decrease"),
        ({"a": torch.ones(16), "b": torch.ones(16)}, {"a": LEVELS}, "b has Fisher weights, but no shape"),
    ],
)
def test_scores_that_do_not_fit_are_refused(weights, thresholds, message):
    given = calibration({"a": 1.0}, {"a": (8, 16)})
    with pytest.raises(ScheduleError, match=message):
        dataclasses.replace(given, fisher=FisherScores(weights, thresholds))


SHAPES = {"a": (8, 16), "b": (8, 32), "c": (32, 16)}


def table(slopes, shapes=SHAPES):
    """Microseconds that fall with sparsity as steeply as each Linear's slope says."""
    return LatencyTable(
        [
            {"n": n, "k": k, "sparsity": at, "us": 1000 - slopes[name] * at}
            for name, (n, k) in shapes.items()
            for at in (0.0, 1.0)
        ]
    )


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
def test_time_that_goes_with_bytes_gives_what_bytes_give(target):
    given = calibration({"a": 1.0, "b": 3.0, "c": 0.5}, SHAPES)
    by_time = was_fx.fisher(given, target, latency=table({name: n * k for name, (n, k) in SHAPES.items()}))
    by_bytes = was_fx.fisher(given, target)
    for name, entry in by_bytes.linears.items():
        assert by_time.linears[name].sparsity == pytest.approx(entry.sparsity, abs=1e-3)


def test_as_much_time_is_saved_as_by_the_same_sparsity_and_where_it_saves_most():
    slopes = {"a": 100.0, "b": 1.0, "c": 10.0}
    made = was_fx.fisher(calibration(dict.fromkeys(SHAPES, 1.0), SHAPES), 0.4, latency=table(slopes))
    saved = sum(slopes[name] * entry.sparsity for name, entry in made.linears.items())
    assert saved == pytest.approx(0.4 * sum(slopes.values()), rel=1e-3)
    assert made.linears["a"].sparsity > made.linears["c"].sparsity > made.linears["b"].sparsity


def test_latency_is_refused_without_the_shapes_and_out_of_range():
    given = calibration(dict.fromkeys(SHAPES, 1.0), SHAPES)
    with pytest.raises(ScheduleError, match="lacks shapes of the model"):
        was_fx.fisher(given, 0.5, latency=table({"a": 1.0}, {"a": (8, 16)}))
    with pytest.raises(ValueError, match="target sparsity must be from 0"):
        was_fx.fisher(given, 1.0, latency=table(dict.fromkeys(SHAPES, 1.0)))

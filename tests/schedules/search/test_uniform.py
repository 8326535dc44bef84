import math

import pytest
import torch

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import Score
from was_fx.schedules.search.uniform import uniform

SHAPES = {"a.up": (1009, 17), "a.down": (3, 2011), "lm_head": (7, 13)}


def make_calibration() -> Calibration:
    levels = (torch.arange(1000, dtype=torch.float64) / 1000).float()
    thresholds = {name: levels * (index + 1) for index, name in enumerate(SHAPES)}
    return Calibration(Score(0.5, 2), levels, thresholds, SHAPES, 77, "text", {"architecture": "Llama"})


def nominal_by_true_counts(schedule: Schedule) -> float:
    counts = {name: math.prod(shape) for name, shape in schedule.shapes.items()}
    dropped = sum(counts[name] * linear.sparsity for name, linear in schedule.linears.items())
    return dropped / sum(counts.values())


@pytest.mark.parametrize("target", [0.0, 0.1, 1 / 3, 0.6, 0.9, 0.9985])
def test_budget_is_met_before_and_after_a_file(tmp_path, target):
    schedule = uniform(make_calibration(), target)
    schedule.save(tmp_path / "schedule")
    loaded = Schedule.load(tmp_path / "schedule")
    assert loaded == schedule
    for each in (schedule, loaded):
        assert abs(nominal_by_true_counts(each) - target) <= 1e-6
        assert abs(each.sparsity - target) <= 1e-6


def test_every_linear_gets_the_target_and_its_threshold():
    schedule = uniform(make_calibration(), 0.25)
    assert list(schedule.linears) == list(SHAPES)
    assert [linear.sparsity for linear in schedule.linears.values()] == [0.25] * 3
    assert [linear.threshold for linear in schedule.linears.values()] == pytest.approx([0.25, 0.5, 0.75])
    assert schedule.score("a.up") == Score(0.5, 2)


def test_metadata_says_where_it_comes_from():
    metadata = uniform(make_calibration(), 0.25).metadata
    assert (metadata.recipe, metadata.target, metadata.seed) == ("uniform", 0.25, None)
    assert (metadata.calibration_text, metadata.calibration_tokens) == ("text", 77)
    assert metadata.fingerprint == {"architecture": "Llama"}


def test_excluded_linears_are_left_out_and_recorded():
    schedule = uniform(make_calibration(), 0.25, exclude={"lm_head"})
    assert list(schedule.linears) == ["a.up", "a.down"]
    assert schedule.metadata.excluded == ("lm_head",)
    assert schedule.sparsity == 0.25
    schedule.check(SHAPES)


@pytest.mark.parametrize("target", [-0.1, 1.0, 50, math.nan, 0.9995])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match=f"found {target}"):
        uniform(make_calibration(), target)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["lm_heat"], r"exclude 'lm_heat' matches none of \d+ Linears \(one is lm_head\)"),
        (SHAPES, "nothing is left"),
    ],
)
def test_exclusions_that_cannot_be_are_refused(exclude, message):
    with pytest.raises(ScheduleError, match=message):
        uniform(make_calibration(), 0.5, exclude=exclude)

import math

import pytest
import torch

from was_fx.schedules.files.linear_schedule import LinearSchedule, schedule_problems
from was_fx.schedules.score import to_fp32

GOOD = LinearSchedule(0.5, 0.1, 1.0)


def test_numbers_are_fp32():
    linear = LinearSchedule(0.6, 0.1, 0.3)
    assert (linear.sparsity, linear.threshold, linear.exponent) == (to_fp32(0.6), to_fp32(0.1), to_fp32(0.3))


def test_channel_threshold_is_an_fp32_copy():
    given = torch.tensor([1.0, math.inf])
    linear = LinearSchedule(0.5, 0.1, 1.0, given)
    given[0] = 7
    assert linear.channel_threshold.tolist() == [1.0, math.inf]
    assert LinearSchedule(0.5, 0.1, 1.0, given.double()).channel_threshold.dtype == torch.float32


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (LinearSchedule(0.5, 0.1, 1.0), True),
        (LinearSchedule(0.5, 0.2, 1.0), False),
        (LinearSchedule(0.5, 0.1, 1.0, torch.ones(2)), False),
        ("something else", False),
    ],
)
def test_equality(other, equal):
    assert (other == GOOD) == equal
    assert LinearSchedule(0.5, 0.1, 1.0, torch.ones(2)) == LinearSchedule(0.5, 0.1, 1.0, torch.ones(2))


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (LinearSchedule(0.5, 2.0, 1.0), [1.0, math.inf]),
        (LinearSchedule(0.5, 2.0, 1.0, torch.tensor([3.0, 4.0])), [3.0, 4.0]),
    ],
    ids=["from the norms", "given"],
)
def test_channel_thresholds(linear, expected):
    assert linear.channel_thresholds(torch.tensor([2.0, 0.0])).tolist() == expected


@pytest.mark.parametrize(
    "linear",
    [
        LinearSchedule(0.0, 0.0, 0.0),
        LinearSchedule(0.999, 1e6, 2.0),
        LinearSchedule(0.5, 0.1, 1.0, torch.tensor([0.0, 1.0, math.inf])),
    ],
)
def test_accepted(linear):
    assert schedule_problems({"a": linear}, {"a": (2, 3)}) == []


@pytest.mark.parametrize(
    ("linears", "shapes", "expected"),
    [
        ({}, {}, ["no Linear is scheduled"]),
        ({"a": GOOD}, {}, ["a has no shape"]),
        ({"a": GOOD}, {"a": (2, 3), "b": (2, 3)}, ["b has a shape but no schedule"]),
        ({"a": GOOD}, {"a": (2, 3, 4)}, ["a has the shape (2, 3, 4), expected (N, K)"]),
        (
            {"a": LinearSchedule(1.0, -1.0, math.nan)},
            {"a": (2, 3)},
            [
                "a: the sparsity is 1.0, expected at least 0 and below 1",
                "a: the threshold is -1.0, expected a finite number of at least 0",
                "a: the exponent is nan, expected a finite number of at least 0",
            ],
        ),
        (
            {"a": LinearSchedule(-0.1, math.inf, -1.0), "b": LinearSchedule(math.nan, math.nan, math.inf)},
            {"a": (2, 3), "b": (2, 3)},
            [
                "a: the sparsity is -0.10000000149011612, expected at least 0 and below 1",
                "a: the threshold is inf, expected a finite number of at least 0",
                "a: the exponent is -1.0, expected a finite number of at least 0",
                "b: the sparsity is nan, expected at least 0 and below 1",
                "b: the threshold is nan, expected a finite number of at least 0",
                "b: the exponent is inf, expected a finite number of at least 0",
            ],
        ),
        (
            {"a": LinearSchedule(0.5, 0.1, 1.0, torch.tensor([1.0, math.nan]))},
            {"a": (2, 3)},
            [
                "a: the channel_threshold is [2], expected [3]",
                "a: the channel_threshold holds NaN or negative values, expected at least 0",
            ],
        ),
    ],
)
def test_every_problem_is_listed(linears, shapes, expected):
    assert schedule_problems(linears, shapes) == expected

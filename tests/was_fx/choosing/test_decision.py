"""The choice that is named, and the front that none other beats."""

import math

import pytest

from was_fx.choosing.choices import Choice
from was_fx.choosing.decision import cost_bytes, cost_time, decide, front, rise


def choice(loss: float, bytes_per_token: int = 100, ms: float | None = None, schedule: str | None = "s") -> Choice:
    return Choice(
        "bf16", schedule, loss, math.exp(loss), 0.5, 0.5, {}, bytes_per_token, (), ms, None if ms is None else 10.0
    )


DENSE = choice(2.0, 100, 10.0, None)
SLIGHT, MORE, MOST = choice(2.01, 80, 8.0), choice(2.04, 60, 6.0), choice(2.5, 30, 3.0)


@pytest.mark.parametrize(
    ("others", "within", "expected", "fits"),
    [
        ([SLIGHT, MORE, MOST], 0.05, MORE, True),
        ([SLIGHT, MORE, MOST], 0.02, SLIGHT, True),
        ([SLIGHT, MORE, MOST], 0.7, MOST, True),
        ([SLIGHT, MORE, MOST], 0.0, SLIGHT, False),
        ([choice(1.9, 80, 12.0)], 0.05, None, False),
        ([], 0.05, None, False),
    ],
)
def test_the_fastest_within_the_limit_else_the_nearest(others, within, expected, fits):
    found = decide([DENSE, *others], within)
    assert (found.choice, found.fits, found.dense) == (expected, fits, DENSE)


def test_without_speeds_it_is_the_one_that_reads_least():
    dense, small, smaller = choice(2.0, 100, schedule=None), choice(2.02, 70), choice(2.04, 60)
    found = decide([dense, small, smaller], 0.05)
    assert found.choice is smaller
    assert found.rise == pytest.approx(math.exp(0.04) - 1)


def test_a_rise_is_of_perplexity():
    assert rise(choice(2.0 + math.log(1.5)), DENSE) == pytest.approx(0.5)


def test_the_front():
    beaten = choice(2.2, 90, 9.0)
    assert front([DENSE, beaten, MOST, SLIGHT, MORE], cost_bytes) == [MOST, MORE, SLIGHT, DENSE]
    assert front([DENSE, choice(2.6, 90, 9.0), MOST], cost_time) == [MOST, DENSE]
    assert front([choice(2.0)], cost_time) == [], "speed was not measured"

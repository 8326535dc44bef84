"""`highest_within`: near the crossing, with few measurements."""

import pytest

from was_fx.schedules.search.highest import highest_within


def counted(cost):
    calls = []

    def measure(sparsity):
        calls.append(sparsity)
        return cost(sparsity)

    return measure, calls


@pytest.mark.parametrize(
    ("cost", "budget", "crossing"),
    [
        (lambda s: s**3.5, 0.01, 0.01 ** (1 / 3.5)),
        (lambda s: 0.005 + 2 * s**3.5, 0.01, 0.0025 ** (1 / 3.5)),
        (lambda s: 2.718 ** (9 * s) / 1000 - 0.001, 0.02, 0.338),
        (lambda s: 5 * s**6, 0.5, 0.1 ** (1 / 6)),
        (lambda s: 30 * s, 0.3, 0.01),
        (lambda s: s, 0.45, 0.45),
        (lambda s: 1.0 * (s > 0.47), 0.5, 0.47),
        (lambda s: s**3.5 - 0.002 * (0.2 < s < 0.3), 0.1, 0.1 ** (1 / 3.5)),
    ],
)  # fmt: skip
def test_the_answer_is_the_crossing_from_below(cost, budget, crossing):
    measure, calls = counted(cost)
    found = highest_within(measure, budget)
    assert found in calls
    assert cost(found) <= budget
    assert crossing - 0.01 <= found <= crossing
    assert len(calls) == len(set(calls))
    assert calls[:4] == [0.0, 0.25, 0.4, 0.5]


def test_a_smooth_cost_takes_three_measurements_beyond_the_grid():
    for crossing in (0.12, 0.2, 0.31, 0.42, 0.47):
        measure, calls = counted(lambda s, at=crossing: 0.1 * (s / at) ** 4.2)
        highest_within(measure, 0.1)
        assert len(calls) <= 4 + 3, calls


@pytest.mark.parametrize(
    ("cost", "expected", "measured"),
    [
        (lambda s: 1 + s, None, [0.0]),
        (lambda s: 0.0, 0.8, [0.0, 0.3, 0.8]),
        (lambda s: 9.0 * (s > 0), 0.0, None),
    ],
)
def test_the_ends(cost, expected, measured):
    measure, calls = counted(cost)
    assert highest_within(measure, 0.5, grid=[0.3, 0.95], limit=0.8) == expected
    assert measured is None or calls == measured
    assert len(calls) < 12

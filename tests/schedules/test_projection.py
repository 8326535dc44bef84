"""Projection onto a budget: exact, within bounds, nearest; levels that never fall."""

import numpy as np
import pytest

from was_fx.schedules.projection import check_budget, project, rising


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_met_within_the_bounds(seed):
    generator = np.random.default_rng(seed)
    weights = generator.uniform(1, 1e6, 32)
    target = generator.uniform(0.3, 0.7)
    lower, upper = target - generator.uniform(0.01, 0.3, 32), target + generator.uniform(0.01, 0.3, 32)
    levels = project(generator.normal(target, 1.0, 32), weights, target, lower, upper)
    assert abs(np.average(levels, weights=weights) - target) < 1e-12
    assert (levels >= lower).all()
    assert (levels <= upper).all()


def test_a_point_that_meets_the_budget_stays():
    point = np.array([0.4, 0.5, 0.6])
    np.testing.assert_allclose(project(point, [1, 1, 1], 0.5, 0.0, 0.9), point, atol=1e-15)


def test_nothing_feasible_is_nearer():
    generator = np.random.default_rng(0)
    weights, z = np.array([1.0, 2.0, 5.0]), np.array([0.9, -0.2, 0.7])
    levels = project(z, weights, 0.5, 0.3, 0.8)
    best = (weights * (levels - z) ** 2).sum()
    for _ in range(500):
        other = project(generator.uniform(0.3, 0.8, 3), weights, 0.5, 0.3, 0.8)
        assert (weights * (other - z) ** 2).sum() >= best - 1e-12


def test_levels_that_never_fall_survive_the_projection():
    generator = np.random.default_rng(1)
    weights = generator.uniform(1, 9, 8)
    levels = project(rising(generator.normal(size=8), weights), weights, 0.5, 0.45, 0.55)
    assert (np.diff(levels) >= -1e-12).all()


@pytest.mark.parametrize(
    ("target", "weights", "lower", "upper", "message"),
    [
        (0.0, [1, 1], 0.0, 0.9, "above 0 and below 1, found 0.0"),
        (1.0, [1, 1], 0.0, 0.9, "above 0 and below 1"),
        (0.5, [1, 1], 0.6, 0.9, "the bounds allow 0.6 to 0.9"),
        (0.95, [1, 3], 0.0, 0.9, "the bounds allow 0 to 0.9"),
        (0.5, [1, 1], 0.6, 0.4, "0 ≤ lower ≤ upper < 1"),
        (0.5, [], 0.4, 0.6, "positive number of weights"),
    ],
)
def test_what_cannot_be_met_is_refused(target, weights, lower, upper, message):
    with pytest.raises(ValueError, match=message):
        check_budget(target, weights, lower, upper)

"""The exact solver of the budgeted allocation."""

import itertools

import numpy as np
import pytest

from was_fx.schedules.search.curves import Curves, solve

LEVELS = np.linspace(0, 1, 11)


def test_no_allocation_on_the_grid_is_better():
    generator = np.random.default_rng(0)
    for _ in range(5):
        losses = np.cumsum(np.sort(generator.uniform(size=(3, 11)), axis=1), axis=1)
        savings = generator.integers(1, 4, 3)[:, None] * LEVELS
        budget = 0.5 * savings[:, -1].sum()
        curves = Curves(LEVELS, losses, savings)
        found = solve(curves, budget, np.zeros(3), np.ones(3))
        assert curves.saved(found) == pytest.approx(budget)
        loss = sum(np.interp(s, LEVELS, curve) for s, curve in zip(found, losses, strict=True))
        for choice in itertools.product(range(11), repeat=3):
            if sum(savings[i, j] for i, j in enumerate(choice)) >= budget - 1e-9:
                assert loss <= sum(losses[i, j] for i, j in enumerate(choice)) + 1e-9


def test_equal_marginal_costs_at_the_solution():
    costs = np.array([1.0, 2.0, 4.0])
    levels = np.linspace(0, 1, 1001)
    curves = Curves(levels, costs[:, None] * levels**2, np.ones((3, 1)) * levels)
    found = solve(curves, 1.2, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(found * costs, (found * costs).mean(), rtol=5e-3)


def test_bounds_hold_and_a_curve_that_is_not_convex_is_taken_by_its_hull():
    bump = np.array([[0, 5, 6, 6.5, 7, 7, 7, 7, 7, 7, 7.0]])
    curves = Curves(LEVELS, np.concatenate([bump, np.ones((1, 11)) * LEVELS * 10]), np.ones((2, 1)) * LEVELS)
    found = solve(curves, 1.0, np.array([0.1, 0.1]), np.array([0.95, 0.95]))
    assert found[0] == pytest.approx(0.9)
    assert found[1] == pytest.approx(0.1)


def test_flat_savings_are_never_bought():
    savings = np.array([np.minimum(LEVELS, 0.5), LEVELS])
    curves = Curves(LEVELS, np.ones((2, 1)) * LEVELS, savings)
    assert solve(curves, 1.2, np.zeros(2), np.ones(2))[0] <= 0.5 + 1e-9


def test_an_impossible_budget_is_refused():
    curves = Curves(LEVELS, np.ones((2, 1)) * LEVELS, np.ones((2, 1)) * LEVELS)
    with pytest.raises(ValueError, match=r"the bounds allow 0 to 1.*widen"):
        solve(curves, 1.5, np.zeros(2), np.full(2, 0.5))

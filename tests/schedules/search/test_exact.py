"""The exact recipe on a model of curves whose best allocation is known."""

import numpy as np
import pytest

from was_fx.schedules.search.exact import ExactSettings, Problem, Sweep, sensitivities, sweep

NAMES = tuple(f"layers.{block}.{kind}" for block in range(4) for kind in ("q", "up"))
LEVELS = np.linspace(0, 1, 101)
TRUE = np.array([8.0, 4.0, 2.0, 1.0, 2.0, 1.0, 4.0, 2.0])


def problem() -> Problem:
    return Problem(NAMES, np.tile(LEVELS**3, (8, 1)), LEVELS, np.ones((8, 1)) * LEVELS)


def divergence(sparsities) -> float:
    values = np.array([sparsities[name] for name in NAMES])
    total = float((TRUE * values**3).sum())
    return total + 0.05 * total**2  # Linears interact


def measured(at, settings):
    return sweep(problem(), at, lambda points: [divergence(p) for p in points], settings)


def test_a_sweep_measures_the_true_ratios():
    found = measured(np.full(8, 0.5), ExactSettings())
    measured_ratios = found.rises / found.drops
    np.testing.assert_allclose(measured_ratios / measured_ratios.sum(), TRUE / TRUE.sum(), rtol=0.15)


def test_the_allocation_beats_uniform_and_meets_the_budget():
    settings = ExactSettings()
    at = np.full(8, 0.6)
    sweeps = []
    for _ in range(settings.sweeps):
        sweeps.append(measured(at, settings))
        at = problem().allocate(sensitivities(NAMES, sweeps, settings), 0.6, settings)
    assert abs(at.mean() - 0.6) < 1e-9
    assert divergence(dict(zip(NAMES, at, strict=True))) < 0.95 * divergence(dict.fromkeys(NAMES, 0.6))
    assert at[0] < at[3]


def test_noise_below_zero_gives_no_free_linear():
    noisy = TRUE.copy()
    noisy[3] = -3.0
    found = sensitivities(NAMES, [Sweep(noisy, np.ones(8))], ExactSettings())
    assert (found > 0).all()
    assert found[3] == found.min()


def test_a_linear_is_drawn_towards_its_block_and_projection():
    values = np.ones(8)
    values[2] = 9.0
    assert 1.0 < sensitivities(NAMES, [Sweep(values, np.ones(8))], ExactSettings())[2] < 9.0


def test_a_step_that_drops_little_counts_for_little():
    """Both sweeps have the same error of the rise; after a small step it is most of what is measured."""
    clear = Sweep(TRUE * 0.4, np.full(8, 0.4))
    noise = np.zeros(8)
    noise[2] = 0.1
    noisy = Sweep(TRUE * 0.01 + noise, np.full(8, 0.01))
    found = sensitivities(NAMES, [clear, noisy], ExactSettings(shrink=1e-6))
    np.testing.assert_allclose(found / TRUE, 1, rtol=0.01)


@pytest.mark.parametrize("settings", [{"sweeps": 0}, {"probe": 0.0}, {"reach": 1.0}, {"shrink": 2.0}, {"tokens": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="exact needs"):
        ExactSettings(**settings)

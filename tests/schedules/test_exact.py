"""The exact recipe on a model of curves whose best allocation is known."""

import numpy as np
import pytest

from was_fx.schedules.exact import ExactSettings, Problem, combine, sensitivities

NAMES = tuple(f"layers.{block}.{kind}" for block in range(4) for kind in ("q", "up"))
LEVELS = np.linspace(0, 1, 101)
TRUE = np.array([8.0, 4.0, 2.0, 1.0, 2.0, 1.0, 4.0, 2.0])


def problem() -> Problem:
    return Problem(NAMES, np.tile(LEVELS**3, (8, 1)), LEVELS, np.ones((8, 1)) * LEVELS)


def divergence(sparsities) -> float:
    values = np.array([sparsities[name] for name in NAMES])
    total = float((TRUE * values**3).sum())
    return total + 0.05 * total**2  # Linears interact


def test_sensitivities_are_the_true_ratios():
    measured = sensitivities(
        problem(), np.full(8, 0.5), lambda points: [divergence(p) for p in points], ExactSettings()
    )
    np.testing.assert_allclose(measured / measured.sum(), TRUE / TRUE.sum(), rtol=0.15)


def test_the_allocation_beats_uniform_and_meets_the_budget():
    settings = ExactSettings()
    at = np.full(8, 0.6)
    sweeps = []
    for _ in range(settings.sweeps):
        sweeps.append(sensitivities(problem(), at, lambda points: [divergence(p) for p in points], settings))
        at = problem().allocate(combine(NAMES, sweeps, settings), 0.6, settings)
    assert abs(at.mean() - 0.6) < 1e-9
    assert divergence(dict(zip(NAMES, at, strict=True))) < 0.95 * divergence(dict.fromkeys(NAMES, 0.6))
    assert at[0] < at[3]


def test_noise_below_zero_gives_no_free_linear():
    noisy = TRUE.copy()
    noisy[3] = -3.0
    combined = combine(NAMES, [noisy], ExactSettings())
    assert (combined > 0).all()
    assert combined[3] == combined.min()


def test_a_linear_is_drawn_towards_its_block_and_projection():
    values = np.ones(8)
    values[2] = 9.0
    assert 1.0 < combine(NAMES, [values], ExactSettings())[2] < 9.0


@pytest.mark.parametrize("settings", [{"sweeps": 0}, {"probe": 0.0}, {"reach": 1.0}, {"shrink": 2.0}, {"tokens": 1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="exact needs"):
        ExactSettings(**settings)

import pytest

from was_fx.schedules.budget import model_sparsity


def test_weighs_by_number_of_weights():
    shapes = {"small": (2, 5), "large": (10, 9), "unscheduled": (1000, 1000)}
    assert model_sparsity({"small": 0.0, "large": 0.5}, shapes) == pytest.approx(0.45, abs=1e-15)

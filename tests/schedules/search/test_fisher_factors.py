"""Groups of Linears, what Fisher weights foresee for them, and factors by what is measured."""

import dataclasses

import pytest
import torch

from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.search.fisher_factors import FisherSettings, corrected, foreseen, linear_groups, raised

LEVELS = torch.arange(1000) / 1000


def test_groups_are_projections_in_parts_of_the_depth():
    names = [
        f"model.layers.{i}.{p}" for i in range(5) for p in ("mlp.up", "mlp.experts.down[0]", "mlp.experts.down[1]")
    ]
    groups = linear_groups(dict.fromkeys(names, (8, 8)), 2)
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert [len(each) for each in groups] == [3, 6, 2, 4]
    assert groups[1][:2] == ["model.layers.0.mlp.experts.down[0]", "model.layers.0.mlp.experts.down[1]"]
    assert len(linear_groups(dict.fromkeys(names, (8, 8)), 50)) == 10


def test_only_the_group_is_raised_and_never_to_one():
    assert raised({"a": 0.3, "b": 0.3, "c": 0.9}, {"a", "c"}, 0.2) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.95})


def test_what_is_foreseen_is_half_the_squares_that_are_dropped():
    x, g = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 2.0, 16)
    scores = (x.abs() * g).double()
    table = FisherScores({"a": g}, {"a": torch.quantile(scores.flatten()[:16000], LEVELS.double())})
    cut = float(table.thresholds["a"][600])
    direct = 0.5 * (scores**2).where(scores <= cut, 0).sum(1).mean().item()
    found = foreseen(table, LEVELS, {"a": 1.0}, {"a": 16}, {"a": 0.0}, {"a": 0.6})
    assert found == pytest.approx(direct, rel=0.05)
    assert foreseen(table, LEVELS, {"a": 0.5}, {"a": 16}, {"a": 0.0}, {"a": 0.6}) == pytest.approx(found / 2)
    part = foreseen(table, LEVELS, {"a": 1.0}, {"a": 16}, {"a": 0.3}, {"a": 0.6})
    assert part == pytest.approx(found - foreseen(table, LEVELS, {"a": 1.0}, {"a": 16}, {"a": 0.0}, {"a": 0.3}))


GROUPS = [["a"], ["b", "c"], ["d"]]
BEFORE = dict.fromkeys("abcd", 1.0)


def test_a_group_that_costs_more_than_foreseen_gets_less():
    found = corrected(BEFORE, GROUPS, [0.03, 0.02, 0.01], [0.02, 0.02, 0.02], 1.0)
    assert found == pytest.approx({"a": 1 / 1.25, "b": 1.0, "c": 1.0, "d": 1 / 0.75})  # half-way to all together
    half = corrected(BEFORE, GROUPS, [0.03, 0.02, 0.01], [0.02, 0.02, 0.02], 0.5)
    assert half == pytest.approx({name: each**0.5 for name, each in found.items()})
    again = corrected(found, GROUPS, [0.02, 0.02, 0.02], [0.02, 0.02, 0.02], 1.0)
    assert again == pytest.approx(BEFORE)


def test_noise_moves_no_group_far():
    found = corrected(BEFORE, GROUPS, [-0.004, 0.02, 0.02], [0.0001, 0.02, 0.02], 1.0)
    assert 0.5 < found["a"] < 2
    wild = corrected(BEFORE, GROUPS, [-1.0, 0.1, 2.0], [0.01, 0.01, 0.01], 1.0)
    assert max(wild.values()) == pytest.approx(3.0)
    assert all(each > 0 for each in wild.values())


@pytest.mark.parametrize("wrong", [{"sweeps": -1}, {"windows": 0}, {"parts": 0}, {"probe": 1.0}, {"step": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="fisher needs"):
        dataclasses.replace(FisherSettings(), **wrong)

"""Greedy allocation inside a block, and the level table it makes."""

import numpy as np
import pytest

from was_fx.schedules.blocks import Block, block_levels, find_blocks
from was_fx.schedules.search.greedy import Greedy, greedy_table
from was_fx.schedules.search.level_table import uniform_table

BLOCK = Block("layers.0", {"layers.0.small": (10, 10), "layers.0.large": (30, 10)})


def weighted(costs):
    """Errors that are weighted sums of squares of sparsities."""
    return lambda candidates: [sum(costs[name] * value**2 for name, value in each.items()) for each in candidates]


def test_steps_save_the_same_weights_whatever_the_size():
    table = greedy_table(BLOCK, weighted({"layers.0.small": 1.0, "layers.0.large": 1.0}), Greedy(step=0.05, limit=0.9))
    steps = np.diff(table.rows, axis=0)
    assert np.allclose(steps[:-2].sum(1)[steps[:-2, 0] > 0], 0.1)  # mean size 200: 0.05 · 200 / 100
    assert np.allclose(np.diff(table.levels)[:8], 0.05 / 2)


def test_the_least_harmful_linear_goes_first():
    table = greedy_table(BLOCK, weighted({"layers.0.small": 100.0, "layers.0.large": 0.01}), Greedy(step=0.1))
    row = table.at(0.5)
    assert row["layers.0.large"] > 0.6
    assert row["layers.0.small"] < 0.1


def test_a_descent_stops_at_the_level_asked_for():
    table = greedy_table(BLOCK, weighted(dict.fromkeys(BLOCK.shapes, 1.0)), Greedy(step=0.05), until=0.3)
    assert 0.3 <= table.levels[-1] < 0.36


def test_interpolated_rows_have_exactly_the_level_and_the_nearest_row_not():
    table = greedy_table(BLOCK, weighted(dict.fromkeys(BLOCK.shapes, 1.0)), Greedy(step=0.05))
    for level in (0.0, 0.123, 0.5, 0.77):
        assert abs(block_levels([BLOCK], table.at(level))[0] - level) < 1e-12
    assert abs(block_levels([BLOCK], table.at(0.513, nearest=True))[0] - 0.513) > 1e-3


def test_counted_shares_change_the_steps_and_not_the_levels():
    shares = Greedy(step=0.05, shares={"small": 0.5})
    table = greedy_table(BLOCK, weighted({"layers.0.small": 0.0, "layers.0.large": 1.0}), shares)
    assert table.rows[1, 0] == pytest.approx(0.05 * 175 / 50)
    assert table.levels[1] == pytest.approx(table.rows[1, 0] / 4)


def test_a_level_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match=r"reaches 0.9.*lower the bounds"):
        uniform_table(BLOCK, 0.9).at(0.92)


@pytest.mark.parametrize(("step", "limit"), [(0.0, 0.9), (0.95, 0.9), (0.1, 1.0)])
def test_settings_out_of_range_are_refused(step, limit):
    with pytest.raises(ValueError, match="0 < step ≤ limit < 1"):
        Greedy(step, limit)


def test_linears_are_grouped_by_block_and_what_lies_outside_stands_alone():
    shapes = {"model.layers.0.a": (2, 2), "model.layers.1.a": (2, 2), "model.layers.1.b.c": (2, 2), "lm_head": (4, 2)}
    blocks = find_blocks(shapes)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert [block.size for block in blocks] == [4, 8, 8]

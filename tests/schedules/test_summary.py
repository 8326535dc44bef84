"""Budgets by part, and warnings."""

import pytest

from was_fx import LinearSchedule, Schedule, load_published
from was_fx.schedules.files.schedule_metadata import ScheduleMetadata
from was_fx.schedules.summary import by_depth, by_projection, group_means, outliers, part, warnings, weights_format


def _schedule(sparsities, shape=(4, 8), **metadata):
    linears = {name: LinearSchedule(sparsity, 1.0, 1.0) for name, sparsity in sparsities.items()}
    return Schedule(linears, dict.fromkeys(linears, shape), metadata=ScheduleMetadata(**metadata))


def test_parts_add_up_to_the_whole():
    schedule = load_published("was-llama-2-7b-60")
    whole = part(schedule)
    assert whole.sparsity == pytest.approx(schedule.sparsity)
    for parts in (by_projection(schedule), by_depth(schedule)):
        assert sum(each.weights for each in parts.values()) == pytest.approx(whole.weights)
        assert sum(each.dropped for each in parts.values()) == pytest.approx(whole.dropped)


@pytest.mark.parametrize(("blocks", "runs"), [(126, 8), (3, 3), (1, 1)])
def test_depth_has_few_runs(blocks, runs):
    found = by_depth(_schedule({f"layers.{block}.fc": 0.5 for block in range(blocks)}))
    assert len(found) == runs
    assert next(iter(found)).startswith("0")
    assert list(found)[-1].endswith(str(blocks - 1))


def test_depths_of_two_schedules_have_the_same_runs():
    longer, shorter = (_schedule({f"layers.{at}.fc": 0.5 for at in range(blocks)}) for blocks in (20, 17))
    runs = list(by_depth(longer, other=shorter))
    assert (runs[0], runs[-1]) == ("0–1", "17–19")
    assert list(by_depth(shorter, other=longer)) == runs[:-1]  # it has none of the last blocks


def test_experts_are_one_part_that_counts_by_what_a_token_reads():
    names = [f"layers.0.experts.up[{expert}]" for expert in range(4)]
    schedule = _schedule(
        {**dict(zip(names, (0.2, 0.4, 0.6, 0.8), strict=True)), "layers.0.q": 0.5},
        experts_per_token={"layers.0.experts.up": 2.0},
    )
    assert group_means(schedule) == pytest.approx({"layers.0.experts.up": 0.5, "layers.0.q": 0.5})
    assert by_projection(schedule)["experts.up"].weights == 2 * 32


def test_a_linear_far_off_the_blocks_around_it_is_named():
    levels = {f"layers.{block}.q": 0.4 for block in range(8)}
    assert outliers(_schedule(levels)) == {}
    odd = _schedule({**levels, "layers.3.q": 0.8})
    assert list(outliers(odd)) == ["layers.3.q"]
    assert "layers.3.q drops 80.0 %, the blocks around it 40.0 %" in warnings(odd)
    ramp = _schedule({f"layers.{block}.q": block / 10 for block in range(9)})
    assert outliers(ramp) == {}


@pytest.mark.parametrize(
    ("level", "words"),
    [(0.3, None), (0.4, "reasoning suffers"), (0.6, "reasoning has collapsed"), (0.75, "text itself suffers")],
)
def test_levels_have_warnings_with_their_source(level, words):
    found = warnings(_schedule({"layers.0.q": level}))
    assert len(found) == (0 if words is None else 1)
    assert all(words in each and "WAS, EMNLP 2025" in each for each in found)


def test_the_format_of_most_linears():
    assert weights_format(None) == weights_format({}) == "bf16"
    assert weights_format({"a": "int4-32", "b": "int4-32", "head": "int8"}) == "int4"

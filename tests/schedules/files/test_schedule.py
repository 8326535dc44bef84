import copy
import math
import pickle

import pytest
import torch

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files import storage
from was_fx.schedules.files.schedule import LinearSchedule, Schedule, ScheduleMetadata
from was_fx.schedules.score import Score

SHAPES = {
    "model.layers.1.mlp.up_proj": (12, 4),
    "model.layers.0.mlp.up_proj": (12, 4),
    "model.layers.0.mlp.down_proj": (4, 12),
}
UP, OTHER_UP, DOWN = SHAPES
FINGERPRINT = {"architecture": "Llama", "shapes": "aa", "weights": "bb"}


def make_schedule() -> Schedule:
    linears = {
        UP: LinearSchedule(0.6, 0.1, 1.0),
        OTHER_UP: LinearSchedule(0.3, 0.2, 0.3),
        DOWN: LinearSchedule(0.5, 0.3, 1.0, torch.arange(12.0)),
    }
    metadata = ScheduleMetadata(
        recipe="wisparse",
        target=0.47,
        seed=1,
        search={"trials": 64},
        calibration_text="text",
        calibration_tokens=100,
        fingerprint=FINGERPRINT,
    )
    return Schedule(linears, SHAPES, norm=2, metadata=metadata)


def test_sparsity_weighs_by_number_of_weights():
    assert make_schedule().sparsity == pytest.approx((0.6 + 0.3 + 0.5) / 3, abs=1e-7)


def test_score_of_a_linear():
    assert make_schedule().score(OTHER_UP) == Score(0.3, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is not scheduled \(did you mean model\."):
        make_schedule().score("layers.0.mlp.up_proj")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule))])
def test_copies_are_equal(way):
    assert way(make_schedule()) == make_schedule()


def test_iteration_keeps_the_order_given_through_a_file(tmp_path):
    make_schedule().save(tmp_path / "schedule")
    assert list(Schedule.load(tmp_path / "schedule").linears) == list(SHAPES)


def test_round_trip_is_equal_and_byte_stable(tmp_path):
    make_schedule().save(tmp_path / "first")
    loaded = Schedule.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    assert loaded == make_schedule()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_replace_changes_the_named_entries_and_metadata_only():
    schedule = make_schedule()
    changed = schedule.replace({UP: LinearSchedule(0.9, 0.7, 1.0)}, recipe="greedy", target=0.5)
    assert changed.linears[UP].threshold == pytest.approx(0.7)
    assert changed.linears[DOWN] == schedule.linears[DOWN]
    assert (changed.metadata.recipe, changed.metadata.seed) == ("greedy", 1)
    assert schedule == make_schedule() != changed


def test_replace_refuses_unscheduled_linears():
    with pytest.raises(ScheduleError, match=r"model\.layers\.1\.mlp\.up is not scheduled \(did you mean"):
        make_schedule().replace({"model.layers.1.mlp.up": LinearSchedule(0.9, 0.7, 1.0)})


def test_construction_lists_every_problem():
    with pytest.raises(ScheduleError, match="the schedule is not valid") as caught:
        Schedule(
            {"a": LinearSchedule(1.5, math.nan, 1.0), "b": LinearSchedule(0.5, 1.0, 1.0)},
            {"a": (2, 3)},
            norm=3,
            metadata=ScheduleMetadata(target=1.0, calibration_tokens=-1),
        )
    assert [problem.split(",")[0] for problem in caught.value.problems] == [
        "a: the sparsity is 1.5",
        "a: the threshold is nan",
        "b has no shape",
        "the norm is p = 3",
        "the target is 1.0",
        "the calibration has -1 tokens",
    ]


@pytest.mark.parametrize(
    ("shapes", "fingerprint", "allow_other_model"),
    [
        (SHAPES, None, False),
        (SHAPES, FINGERPRINT, False),
        (SHAPES, {}, False),
        (SHAPES, {**FINGERPRINT, "weights": "cc"}, True),
    ],
)
def test_check_accepts(shapes, fingerprint, allow_other_model):
    make_schedule().check(shapes, fingerprint, allow_other_model=allow_other_model)


def test_check_needs_no_entry_for_excluded_linears():
    schedule = make_schedule().replace({}, excluded=("lm_head",))
    schedule.check({**SHAPES, "lm_head": (100, 4)})


@pytest.mark.parametrize(
    ("shapes", "fingerprint", "expected"),
    [
        ({**SHAPES, "lm_head": (100, 4)}, None, ["the schedule has no entry for lm_head"]),
        (
            {UP: (12, 4), OTHER_UP: (12, 4)},
            None,
            [f"{DOWN} is no Linear of the model that can be scheduled (did you mean {OTHER_UP}?)"],
        ),
        ({**SHAPES, UP: (13, 4)}, None, [f"{UP} is [13, 4] in the model, expected [12, 4]"]),
        (
            SHAPES,
            {**FINGERPRINT, "architecture": "Qwen"},
            ["another model: the architecture is Qwen, expected Llama"],
        ),
        (
            {UP: (1, 1), DOWN: (4, 12), "new": (2, 2)},
            {"architecture": "Qwen", "shapes": "x"},
            [
                f"{OTHER_UP} is no Linear of the model that can be scheduled (did you mean {UP}?)",
                "the schedule has no entry for new",
                f"{UP} is [1, 1] in the model, expected [12, 4]",
                "another model: the architecture is Qwen, expected Llama",
                "another model: the names or shapes of the Linears are others",
            ],
        ),
    ],
    ids=["missing", "unknown", "shape", "fingerprint", "everything"],
)
def test_check_lists_every_problem(shapes, fingerprint, expected):
    with pytest.raises(ScheduleError, match="the schedule does not fit the model") as caught:
        make_schedule().check(shapes, fingerprint)
    assert caught.value.problems == expected
    assert ("allow_other_model" in str(caught.value)) == any("another model" in line for line in expected)


def damaged(tmp_path, tensors=(), metadata=()):
    """A saved schedule with some tensors and metadata changed, or removed where None is given."""
    path = tmp_path / "schedule"
    make_schedule().save(path)
    old_tensors, old_metadata = storage.read(path, storage.SCHEDULE)
    new_tensors = {**old_tensors, **dict(tensors)}
    new_metadata = {**old_metadata, **dict(metadata)}
    storage.write(
        path,
        storage.SCHEDULE,
        {key: value for key, value in new_tensors.items() if value is not None},
        {key: value for key, value in new_metadata.items() if value is not None},
    )
    return path


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ({f"{UP}.sparsity": None}, {}, [f"{UP}.sparsity is missing"]),
        ({f"{UP}.threshold": torch.tensor(math.nan)}, {}, [f"{UP}: the threshold is nan"]),
        ({f"{UP}.threshold": torch.tensor(-1.0)}, {}, [f"{UP}: the threshold is -1.0"]),
        ({f"{DOWN}.channel_threshold": torch.ones(4)}, {}, [f"{DOWN}: the channel_threshold is [4]"]),
        ({f"{UP}.sparsity": torch.tensor(0.0)}, {}, ["the nominal sparsity is recorded as 0.46"]),
        ({"extra": torch.tensor(1.0)}, {}, ["unknown tensor extra"]),
        ({}, {"recipe": None}, ["metadata 'recipe' is missing"]),
        ({}, {"note": "x"}, ["unknown metadata 'note'"]),
        ({}, {"norm": "3"}, ["the norm is p = 3"]),
        (
            {
                f"{UP}.exponent": torch.tensor(-1.0),
                f"{DOWN}.threshold": torch.ones(2),
                "x.sparsity": torch.ones(()),
            },
            {"seed": '"one"', "norm": "0"},
            [
                "metadata 'seed' is",
                f"{DOWN}.threshold is float32 [2]",
                "x.threshold is missing",
                "x.exponent is missing",
                "x has no shape",
                f"{UP}: the exponent is -1.0",
                "the norm is p = 0",
            ],
        ),
        ({}, {"shapes": "{}"}, [f"{name} has no shape" for name in (DOWN, OTHER_UP, UP)]),
    ],
)
def test_load_lists_every_problem_and_the_path(tmp_path, tensors, metadata, expected):
    path = damaged(tmp_path, tensors, metadata)
    with pytest.raises(ScheduleError, match="is not a valid schedule") as caught:
        Schedule.load(path)
    assert str(path) in str(caught.value)
    problems = caught.value.problems
    assert len(problems) == len(expected), problems
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True)), problems


def test_a_calibration_is_not_loaded_as_a_schedule(tmp_path):
    storage.write(tmp_path / "calibration", storage.CALIBRATION, {}, {})
    with pytest.raises(ScheduleError, match=r"Load it with Calibration\.load"):
        Schedule.load(tmp_path / "calibration")

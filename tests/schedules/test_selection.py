"""Choosing Linears by name, glob or regular expression."""

import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.selection import select

BODY = [
    f"model.layers.{i}.{each}" for i in range(2) for each in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]
NAMES = [*BODY, "lm_head"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, (), BODY),
        ("*", (), NAMES),
        ("lm_head", (), ["lm_head"]),
        (["*.q_proj", "*.k_proj"], (), [name for name in BODY if "self_attn" in name]),
        (None, "*.mlp.*", [name for name in BODY if "mlp" not in name]),
        (None, ["*.layers.0.*", "re:.*k_proj"], ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
        (r"re:model\.layers\.[1-9]\..*", "*.mlp.up_proj", [BODY[3], BODY[4]]),
        (["*.up_proj", "model.layers.?.mlp.*"], (), [BODY[2], BODY[5]]),  # no name twice, in the order of the model
        ("*.[qk]_proj", BODY[0], [BODY[1], BODY[3], BODY[4]]),
    ],
)
def test_patterns_choose(include, exclude, expected):
    assert select(NAMES, include, exclude, default=BODY) == expected


def test_without_a_default_all_are_taken():
    assert select(NAMES) == NAMES


@pytest.mark.parametrize(
    ("include", "exclude", "problems"),
    [
        ("*.gate_proj", (), ["include '*.gate_proj' matches none of 7 Linears (one is "]),
        (None, "model.layers.0.mlp.up_prj", ["(one is model.layers.0.mlp.up_proj)"]),
        (
            "Q_PROJ",
            ["*.nothing", "re:("],
            ["include 'Q_PROJ'", "exclude '*.nothing'", "exclude 're:(' is not a regular"],
        ),
        ("re:q_proj", (), ["include 're:q_proj' matches none"]),  # the whole name must match
        ("*.mlp.*", "*", ["nothing is left of 7 Linears"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_all(include, exclude, problems):
    with pytest.raises(ScheduleError) as error:
        select(NAMES, include, exclude, default=BODY)
    assert len(error.value.problems) == len(problems)
    for problem in problems:
        assert problem in str(error.value)

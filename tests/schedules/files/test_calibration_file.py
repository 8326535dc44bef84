import json
import math

import pytest
import torch

from was_fx.schedules.files.calibration_file import (
    calibration_problems,
    pack,
    unpack,
    unpack_settings,
)
from was_fx.schedules.files.metadata import MetadataReader
from was_fx.schedules.score import Score

LEVELS = torch.tensor([0.0, 0.5, 0.75])
GOOD = torch.tensor([0.0, 0.0, 2.0])
SHAPES = {"z": (2, 3), "a": (4, 5)}


def test_tensors_there_and_back_keep_their_order():
    thresholds = {"z": GOOD, "a": GOOD + 1}
    levels, found, fisher, problems = unpack(pack(LEVELS, thresholds), SHAPES)
    assert torch.equal(levels, LEVELS)
    assert list(found) == ["z", "a"]
    assert torch.equal(found["a"], GOOD + 1)
    assert fisher is None
    assert problems == []


def test_unknown_tensors_are_named():
    problems = unpack({"levels": LEVELS, "a.threshold": LEVELS}, {})[3]
    assert problems == ["unknown tensor a.threshold: expected levels or <Linear>.thresholds"]


def test_settings_of_a_file():
    settings = (Score(0.3, 2), SHAPES, 100, "text", {"architecture": "Llama"}, ("lm_head",))
    values = {"exponent": Score(0.3).exponent, "norm": 2, "shapes": SHAPES, "tokens": 100, "excluded": ["lm_head"]}
    strings = {name: json.dumps(value) for name, value in values.items()}
    reader = MetadataReader({**strings, "text": "text", "fingerprint": '{"architecture": "Llama"}'})
    assert unpack_settings(reader) == settings
    assert reader.problems == []


def test_an_impossible_score_is_noted():
    reader = MetadataReader({"exponent": "-1", "norm": "2"})
    unpack_settings(reader)
    assert reader.problems[:1] == ["a score's exponent must be finite and at least 0, found -1"]


def test_good_numbers_have_no_problems():
    assert calibration_problems(LEVELS, {"z": GOOD, "a": GOOD}, SHAPES, 1) == []


@pytest.mark.parametrize(
    ("levels", "thresholds", "tokens", "expected"),
    [
        (LEVELS, {}, 1, ["no Linear is calibrated", "a has a shape but no thresholds"]),
        (LEVELS, {"a": GOOD}, 0, ["the calibration has 0 tokens, expected at least 1"]),
        (
            LEVELS.double(),
            {"a": GOOD},
            1,
            ["the levels are float64 [3], expected float32 [L] with L of at least 2"],
        ),
        (LEVELS.flip(0), {"a": GOOD}, 1, ["the levels must increase from 0 to below 1"]),
        (LEVELS * math.nan, {"a": GOOD}, 1, ["the levels must increase from 0 to below 1"]),
        (LEVELS, {"a": GOOD, "b": GOOD}, 1, ["b has thresholds, but the shape None: expected (N, K)"]),
        (LEVELS, {"a": GOOD[:2]}, 1, ["a: the thresholds are float32 [2], expected float32 [3]"]),
        (LEVELS, {"a": GOOD.half()}, 1, ["a: the thresholds are float16 [3], expected float32 [3]"]),
        (LEVELS, {"a": GOOD * math.nan}, 1, ["a: the thresholds hold NaN, infinite or negative values"]),
        (LEVELS, {"a": GOOD - 1}, 1, ["a: the thresholds hold NaN, infinite or negative values"]),
        (LEVELS, {"a": GOOD.flip(0)}, 1, ["a: the thresholds decrease where the sparsity increases"]),
    ],
)
def test_every_problem_is_listed(levels, thresholds, tokens, expected):
    assert calibration_problems(levels, thresholds, {"a": (4, 5)}, tokens) == expected

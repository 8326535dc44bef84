"""`was tune`, with the GPU and the measuring pretended."""

from pathlib import Path

import pytest
import torch

from was_fx.kernels.parts import gemv_config
from was_fx.kernels.parts.gemv_config import ExpertsShape, GemvConfig, LinearsShape
from was_fx.measure import gemv_shapes, tuning

SHAPES = [
    LinearsShape(64, (96, 32), "int8"),
    LinearsShape(64, (128,), "int4"),
    LinearsShape(64, (32,), torch.bfloat16),
    ExpertsShape(64, 96, 2, "int8"),
]


@pytest.fixture
def asked(monkeypatch):
    """What shapes were asked for, and what was tuned."""
    found: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def shapes(config, dtype, weights):
        found["shapes"] = config.model_type, dtype, weights
        return SHAPES

    def tune(shapes, **_):
        found["tuned"] = shapes
        return Path("pretended_gpu.json")

    monkeypatch.setattr(gemv_shapes, "gemv_shapes", shapes)
    monkeypatch.setattr(tuning, "tune", tune)
    keys = [shape.key for shape in SHAPES]
    monkeypatch.setattr(gemv_config, "tuned", lambda _: dict.fromkeys(keys, GemvConfig(64, 32, 3, 4)))
    return found


def test_shapes_of_quantised_weights_are_tuned_by_their_format(was, other_model, asked):
    outcome = was("tune", other_model, "--weights", "int8", "--weights", "*.up_proj=int4", "--json")
    assert outcome.code == 0, outcome.stderr
    assert asked["shapes"] == ("llama", torch.bfloat16, {"*": "int8", "*.up_proj": "int4"})
    assert asked["tuned"] == SHAPES
    assert list(outcome.json["configurations"]) == ["64,96+32,int8", "64,128,int4", "64,32,bfloat16", "64,2*96,int8"]


def test_without_weights_it_is_the_plain_product(was, other_model, asked):
    outcome = was("tune", other_model, "--dtype", "fp16")
    assert outcome.code == 0, outcome.stderr
    assert asked["shapes"] == ("llama", torch.float16, None)
    assert "64,96+32,int8" in outcome.stdout


def test_refusals(was, other_model, monkeypatch):
    assert "the format of weights is 'int2'" in was("tune", other_model, "--weights", "int2").stderr.replace("\n", " ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = was("tune", other_model, "--weights", "int8")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "no CUDA device" in outcome.error

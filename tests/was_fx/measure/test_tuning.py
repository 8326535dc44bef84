"""The user's file of measured tile sizes, with the measuring itself pretended."""

import json

import pytest
import torch
from transformers import LlamaConfig

from was_fx.kernels.parts.gemv_config import GemvConfig, LinearsShape, tuned
from was_fx.measure import tuning
from was_fx.measure.gemv_shapes import gemv_shapes

SHAPES = [LinearsShape(64, (32,), torch.bfloat16), LinearsShape(64, (32, 16), torch.bfloat16)]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The shapes that were measured, in order."""
    found: list = []

    def pretended(shape):
        if shape in found:
            raise KeyboardInterrupt
        found.append(shape)
        return GemvConfig(64, 32, len(found), 4), {"0.5": 1.0}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Pretended GPU")
    monkeypatch.setattr(tuning, "tune_shape", pretended)
    return found


def test_each_shape_is_measured_once_and_kept(measured):
    steps = []
    path = tuning.tune(SHAPES, progress=lambda *step: steps.append(step))
    assert path.name == "pretended_gpu.json"
    assert tuning.tune(SHAPES) == path
    assert measured == SHAPES
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert tuned(path.name)["64,32+16,bfloat16"] == GemvConfig(64, 32, 2, 4)


def test_an_interruption_keeps_what_was_measured(measured):
    with pytest.raises(KeyboardInterrupt):
        tuning.tune([SHAPES[0], SHAPES[1], SHAPES[1]], again=True)
    (path,) = (tuning.user_folder()).iterdir()
    assert len(json.loads(path.read_text())["configurations"]) == 2


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        tuning.tune(SHAPES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_products_of_a_quantised_model_are_found(weights):
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024
    )
    found = gemv_shapes(config, torch.bfloat16, weights)
    body = [(256, (256, 128, 128)), (256, (256,)), (256, (512, 512)), (512, (256,))]
    assert {(*shape, weights) for shape in body} <= set(found)
    assert (256, (1024,), "int8") in found  # the head
    assert not any(isinstance(format, torch.dtype) for *_, format in found)

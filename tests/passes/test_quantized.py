"""Compiled models with quantised weights decode as the same model with the weak input channels set to zero."""

import pytest
import torch
import transformers

import was_fx
from tests.passes.test_architectures import ARCHITECTURES, PROMPT, assert_alike, compiled, contexts, generate, oracle
from was_fx.compat.dynamo import settings_for_models
from was_fx.kernels.linear import cpu_quantized

__all__ = ["contexts"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products by the meaning; the kernels, which round otherwise, have tests of their own."""
    monkeypatch.setattr(cpu_quantized, "supports", lambda x, rows: False)


@pytest.fixture(params=["int8", "int4", "mixed"])
def weights(request):
    return {"*mlp*": "int4", "*.k_proj": "none", "*": "int8"} if request.param == "mixed" else request.param


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.usefixtures("meanings")
def test_quantised_models_decode_as_the_oracle(name, weights, lists, contexts):
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name][0])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    was_fx.quantize(model, weights)
    prompt = torch.randint(2, 128, (1, PROMPT))
    schedule = was_fx.uniform(was_fx.calibrate(model, torch.randint(2, 128, (2, 16))), 0.5)
    expected = generate(oracle(model, schedule), prompt)
    compiled(model, schedule, lists=lists)
    with settings_for_models():
        assert_alike(generate(model, prompt, cache_implementation="static"), expected)
    decode = contexts[-1]
    assert decode.decode
    assert decode.counts["sparse"] == len(schedule.linears)
    assert decode.counts["listed"] == (len(schedule.linears) if lists else 0)

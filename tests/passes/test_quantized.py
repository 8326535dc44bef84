"""Compiled models with quantised weights decode as the same model with the weak input channels set to zero."""

import pytest
import torch
import transformers

import was_fx
from tests.passes.test_architectures import ARCHITECTURES, PROMPT, assert_alike, compiled, contexts, generate, oracle
from was_fx.compat.dynamo import settings_for_models
from was_fx.kernels.linear import cpu_quantized
from was_fx.kernels.linear.quantized_linear import quantized_linear
from was_fx.kernels.ops.compact import compact_op
from was_fx.modules.quantized_embedding import embedding_formats
from was_fx.modules.quantized_linear import weight_formats

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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("head", "scheduled"),
    [(None, True), ("int8", False), ("int8", True), ("int4", False)],
    ids=["sparse", "int8", "sparse int8", "int4"],
)
@pytest.mark.usefixtures("meanings")
def test_a_head_of_its_own_format_or_with_a_schedule_decodes_as_the_oracle(head, scheduled, tied, contexts):
    config = transformers.LlamaConfig(**{**ARCHITECTURES["Llama"][0], "tie_word_embeddings": tied})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if head:
        was_fx.quantize(model, {"lm_head": head})
    assert ("lm_head" in weight_formats(model)) == bool(head)
    assert embedding_formats(model) == ({"model.embed_tokens": "tied"} if tied and head else {})
    tokens, prompt = torch.randint(2, 128, (2, 16)), torch.randint(2, 128, (1, PROMPT))
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens, include="*" if scheduled else None), 0.5)
    assert ("lm_head" in schedule.linears) == scheduled
    expected = generate(oracle(model, schedule), prompt)
    compiled(model, schedule, lists=True)
    with settings_for_models():
        assert_alike(generate(model, prompt, cache_implementation="static"), expected)
    decode = contexts[-1]
    assert decode.counts["sparse"] == decode.counts["listed"] == len(schedule.linears) == 14 + scheduled
    assert decode.counts["fused norms"] == 5
    listings = decode.module.graph.find_nodes(op="call_function", target=compact_op)
    assert not listings, "the last norm lists the channels of the head, and nothing lists those of a dense one"
    targets = [node.target for node in decode.module.graph.nodes]
    assert targets.count(quantized_linear) == (bool(head) and not scheduled)

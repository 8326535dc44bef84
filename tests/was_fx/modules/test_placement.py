"""Models that accelerate spread over devices or offloaded: the same results as on one device."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import was_fx
from was_fx.modules.linears import find_linears
from was_fx.modules.placement import input_device, whole_channel_norms
from was_fx.schedules.score import channel_norms

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, _llama):
    folder = tmp_path_factory.mktemp("llama")
    _llama.save_pretrained(folder)
    return folder


@pytest.fixture
def offloaded(checkpoint, tmp_path):
    """The second block on disk."""
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path).eval()
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    return model


@pytest.fixture
def spread(checkpoint):
    """Every part by itself, with accelerate's hooks, as over several devices."""
    from accelerate import dispatch_model

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return dispatch_model(model, dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)


@torch.no_grad()
def logits(model, tokens) -> torch.Tensor:
    """Logits [9, V] of a prompt's last token and of eight decode steps."""
    cached = model(tokens[:1, :16], use_cache=True)
    found = [cached.logits[:, -1]]
    for step in range(16, 24):
        cached = model(tokens[:1, step : step + 1], past_key_values=cached.past_key_values, use_cache=True)
        found.append(cached.logits[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("where", "prefill"),
    [("offloaded", "dense"), ("offloaded", "sparse"), ("offloaded", "half"), ("offloaded", "all"), ("spread", "all")],
)
def test_logits_equal_one_device(where, prefill, request, llama, calibration, tokens):
    model = request.getfixturevalue(where)
    schedule = was_fx.uniform(calibration, 0.5)
    dense = logits(llama, tokens)
    expected = logits(was_fx.sparsify(llama, schedule, prefill=prefill), tokens)
    assert not torch.allclose(expected, dense, rtol=0.1)
    was_fx.sparsify(model, schedule, prefill=prefill)
    torch.testing.assert_close(logits(model, tokens), expected, **TOLERANCE)


@pytest.mark.parametrize("where", ["offloaded", "spread"])
def test_evaluation_equals_one_device(where, request, llama, calibration, tokens):
    model = request.getfixturevalue(where)
    schedule = was_fx.uniform(calibration, 0.5)
    expected = was_fx.evaluate(was_fx.sparsify(llama, schedule), tokens)
    found = was_fx.evaluate(was_fx.sparsify(model, schedule), tokens)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.linears == pytest.approx(expected.linears, rel=1e-3)
    assert found.bytes_saved == pytest.approx(expected.bytes_saved, rel=1e-3)


@pytest.mark.parametrize("where", ["offloaded", "spread"])
def test_other_numbers_and_densify(where, request, llama, calibration, tokens):
    model = request.getfixturevalue(where)
    hooks = sum(hasattr(module, "_hf_hook") for module in model.modules())
    assert hooks > len(PARTS)
    before, attributes = logits(model, tokens), set(model.__dict__)
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.0))
    torch.testing.assert_close(logits(model, tokens), before, **TOLERANCE)
    was_fx.densify(model)
    torch.testing.assert_close(logits(model, tokens), before, **TOLERANCE)
    assert sum(hasattr(module, "_hf_hook") for module in model.modules()) == hooks
    assert set(model.__dict__) == attributes
    with pytest.raises(ValueError, match="prefill='dense'"):
        was_fx.evaluate(was_fx.sparsify(model, was_fx.uniform(calibration, 0.5)), tokens, prefill="dense")


@pytest.mark.parametrize("where", ["offloaded", "spread"])
def test_calibration_equals_one_device(where, request, calibration, tokens):
    found = was_fx.calibrate(request.getfixturevalue(where), tokens)
    assert list(found.thresholds) == list(calibration.thresholds)
    for name, thresholds in found.thresholds.items():
        torch.testing.assert_close(thresholds, calibration.thresholds[name])


@pytest.mark.parametrize("norm", [1, 2])
def test_norms_of_an_offloaded_weight_are_read_and_the_weight_is_gone_again(norm, offloaded, llama):
    linear = find_linears(offloaded)["model.layers.1.mlp.up_proj"]
    expected = channel_norms(llama.model.layers[1].mlp.up_proj.weight, norm)
    assert whole_channel_norms(linear, norm).equal(expected)
    assert linear.parameter.is_meta


def test_a_weight_that_nothing_loads_is_refused(llama):
    linear = find_linears(llama.to("meta"))["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: .* nothing loads it"):
        whole_channel_norms(linear, 1)


def test_tokens_belong_with_the_first_weight_that_is_there(offloaded, llama):
    assert input_device(offloaded) == input_device(llama) == torch.device("cpu")

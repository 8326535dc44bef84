"""Models with LoRA adapters of PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import was_fx

ALL = {"prefill": "all"}
ADAPTED = ["q_proj", "down_proj"]


def with_adapters(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False)).eval()


def dropping(model, schedule):
    """`model`, whose base Linears see their input with the dropped channels zeroed; adapters see all of it."""
    for name, entry in schedule.linears.items():
        module = model.get_base_model().get_submodule(name)
        module = getattr(module, "base_layer", module)
        threshold = entry.threshold / module.weight.detach().abs().sum(0) ** entry.exponent
        module.register_forward_pre_hook(
            lambda _, inputs, threshold=threshold: (inputs[0].masked_fill(inputs[0].abs() <= threshold, 0),)
        )
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def schedule(calibration):
    return was_fx.uniform(calibration, 0.5)


@pytest.mark.parametrize("sparsified", ["before", "after", "loaded"])
def test_adapters_that_are_not_merged(llama, schedule, tokens, tmp_path, sparsified):
    dense = with_adapters(copy.deepcopy(llama))
    expected = dropping(with_adapters(copy.deepcopy(llama)), schedule)
    if sparsified == "after":
        model = with_adapters(llama)
        was_fx.sparsify(model.get_base_model(), schedule, **ALL)
    elif sparsified == "before":
        model = with_adapters(was_fx.sparsify(llama, schedule, **ALL))
    else:
        dense.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(was_fx.sparsify(llama, schedule, **ALL), tmp_path)
    prompt = tokens[:1, :12]
    torch.testing.assert_close(logits(model, prompt), logits(expected, prompt), atol=2e-4, rtol=1e-4)
    if sparsified == "after":
        arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        got = model.generate(input_ids=prompt, **arguments)
        assert got.equal(expected.generate(input_ids=prompt, **arguments))
    was_fx.densify(model.get_base_model())
    torch.testing.assert_close(logits(model, prompt), logits(dense, prompt))


def test_merged_adapters_are_another_model_of_the_same_shape(llama, schedule, oracle, tokens):
    merged = with_adapters(llama).merge_and_unload()
    with pytest.raises(was_fx.ScheduleError, match="another model: the weights have other values"):
        was_fx.sparsify(merged, schedule, **ALL)
    expected = oracle(merged, schedule)
    was_fx.sparsify(merged, schedule, allow_other_model=True, **ALL)
    prompt = tokens[:1, :12]
    torch.testing.assert_close(logits(merged, prompt), logits(expected, prompt), atol=2e-4, rtol=1e-4)


def test_a_calibration_with_adapters_has_the_names_of_the_model_without(llama, calibration, tokens):
    model = with_adapters(llama)
    found = was_fx.calibrate(model.get_base_model(), tokens[:, :16])
    assert set(found.thresholds) == set(calibration.thresholds)


@pytest.mark.parametrize("function", [was_fx.sparsify, was_fx.calibrate])
def test_the_wrapper_of_peft_is_refused_with_the_way_out(llama, schedule, tokens, function):
    argument = schedule if function is was_fx.sparsify else tokens
    with pytest.raises(ValueError, match=r"PeftModel wraps a model with adapters.*model\.get_base_model\(\)"):
        function(with_adapters(llama), argument)

"""Multimodal models: their text decoder is made sparse, their towers are left alone. Small ones with random weights."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import was_fx
from was_fx.coverage.tiny_images import image_prompt
from was_fx.coverage.tiny_models import TEXT, tiny_model
from was_fx.measure.sequential import thresholds_of
from was_fx.modules.linears import (
    body_linears,
    dropping,
    find_linears,
    outside_decoder,
    weight_bytes_per_token,
)
from was_fx.sparse.state import sparse_state

CANT_RUN = pytest.mark.xfail(
    Version(transformers.__version__) >= Version("5.24"),
    strict=True,
    reason="the dense model can't run: Llama4ForConditionalGeneration reads outputs.image_outputs of a causal LM",
)
FAMILIES = [
    "gemma3",
    "gemma4",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "llava",
    "mistral3",
    pytest.param("llama4", marks=CANT_RUN),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text():
    return torch.randint(3, TEXT, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def _gemma3():
    return tiny_model("gemma3")


@pytest.fixture
def gemma3(_gemma3):
    """A Gemma 3 with a vision tower, a copy of the test's own."""
    return copy.deepcopy(_gemma3)


@torch.no_grad()
def answer(model, prompt):
    """Logits [8, V] of greedy decoding, and the tokens."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(**prompt, **settings, output_logits=True, return_dict_in_generate=True)
    return torch.cat(found.logits).float(), found.sequences


def oracle_answer(model, schedule, prompt):
    """The same of a dense model whose weak channels are zeroed by hooks, in the prompt too."""
    linears = {name: each for name, each in find_linears(model).items() if name in schedule.linears}
    with dropping(linears, thresholds_of(schedule, linears)):
        return answer(model, prompt)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_answer_about_an_image_is_that_of_the_oracle(model_type, text, tmp_path):
    model = tiny_model(model_type)
    prompt = image_prompt(model, text[:1, :8])
    dense, _ = answer(model, prompt)
    calibration = was_fx.calibrate(model, text)
    assert set(calibration.thresholds) == set(body_linears(model))
    schedule = was_fx.uniform(calibration, 0.5)
    expected, words = oracle_answer(model, schedule, prompt)
    scale = dense.abs().max()
    assert (expected - dense).abs().max() > 0.01 * scale

    was_fx.sparsify(model, was_fx.uniform(calibration, 0.0), prefill="all")
    found, _ = answer(model, prompt)
    torch.testing.assert_close(found, dense, atol=1e-4 * scale, rtol=0)
    was_fx.sparsify(model, schedule, prefill="all")
    found, said = answer(model, prompt)
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=0)
    assert said.equal(words)
    assert was_fx.check(model).ok

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded) is not nn.Module
    assert sparse_state(loaded).schedule == schedule
    assert sparse_state(loaded).rule.prefill == "all"
    found, _ = answer(loaded, prompt)
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=0)

    was_fx.densify(model)
    found, _ = answer(model, prompt)
    torch.testing.assert_close(found, dense, atol=0, rtol=0)


def test_compiled(gemma3, text):
    model = gemma3
    prompt = image_prompt(model, text[:1, :8])
    schedule = was_fx.uniform(was_fx.calibrate(model, text), 0.5)
    expected, _ = oracle_answer(model, schedule, prompt)
    was_fx.sparsify(model, schedule, prefill="all")
    model.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    found, _ = answer(model, prompt)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max(), rtol=0)


def test_what_lies_outside_of_the_decoder_is_left_out_and_counted(gemma3):
    names, share = outside_decoder(gemma3)
    assert {name.split(".")[1] for name in names} == {"vision_tower"}
    body = body_linears(gemma3)
    assert all(name.startswith("model.language_model.layers.") for name in body)
    assert set(find_linears(gemma3)) == {*names, *body, "lm_head"}
    tower = sum(
        each.nbytes
        for part in (gemma3.model.vision_tower, gemma3.model.multi_modal_projector)
        for each in part.parameters()
    )
    everything = sum(each.nbytes for each in gemma3.parameters())
    assert share == tower / everything
    assert weight_bytes_per_token(gemma3) == everything - tower


def test_a_tower_inside_of_the_decoder_is_left_out():
    model = tiny_model("git")
    assert not any("image_encoder" in name for name in body_linears(model))
    assert any("image_encoder" in name for name in outside_decoder(model)[0])


def test_linears_that_text_does_not_reach_are_left_out(caplog, text):
    """Those of Mllama's cross-attention, which reads an image."""
    model = tiny_model("mllama")
    calibration = was_fx.calibrate(model, text)
    assert calibration.excluded
    assert all("cross_attn" in name or ".1." in name for name in calibration.excluded)
    assert f"{len(calibration.excluded)} of {len(body_linears(model))} Linears are left out" in caplog.text
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    with pytest.raises(was_fx.ScheduleError, match="has seen no token"):
        was_fx.calibrate(was_fx.densify(model), text, include="*")


def text_only(gemma3):
    """The text-only class with the same weights."""
    model = AutoModelForCausalLM.from_config(gemma3.config.text_config, dtype=torch.float32).eval()
    model.model.load_state_dict(gemma3.model.language_model.state_dict())
    model.lm_head.load_state_dict(gemma3.lm_head.state_dict())
    return model


@pytest.mark.parametrize("recipe", ["uniform", "fisher"])
def test_a_schedule_of_the_text_only_class_fits_and_back(gemma3, text, recipe):
    inner = text_only(gemma3)

    def made(model):
        calibration = was_fx.calibrate(model, text, fisher=recipe == "fisher")
        found = was_fx.fisher(calibration, 0.5) if recipe == "fisher" else was_fx.uniform(calibration, 0.5)
        return found.replace({}, excluded=("lm_head",))

    of_text, of_whole = made(inner), made(gemma3)
    assert {f"model.language_model.{name.removeprefix('model.')}" for name in of_text.linears} == set(of_whole.linears)
    was_fx.sparsify(gemma3, of_text)
    assert sparse_state(gemma3).schedule == of_whole
    was_fx.sparsify(inner, of_whole)
    assert sparse_state(inner).schedule == of_text


def test_a_schedule_of_other_weights_does_not_fit(gemma3, text):
    inner = text_only(gemma3)
    inner.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    schedule = was_fx.uniform(was_fx.calibrate(inner, text), 0.5)
    with pytest.raises(
        was_fx.ScheduleError, match="the decoder of Gemma3ForCausalLM has the same Linears, and other w"
    ):
        was_fx.sparsify(gemma3, schedule)
    was_fx.sparsify(gemma3, schedule, allow_other_model=True)
    assert was_fx.check(gemma3).ok


def test_a_schedule_of_another_decoder_says_what_it_has(gemma3, llama, text):
    schedule = was_fx.uniform(was_fx.calibrate(llama, text), 0.5)
    with pytest.raises(was_fx.ScheduleError, match=r"up_proj is \[96, 64\] in the model, expected \[160, 64\]"):
        was_fx.sparsify(gemma3, schedule)
    gpt2 = tiny_model("gpt2")
    with pytest.raises(
        was_fx.ScheduleError, match=r"none of its Linears, such as model\.layers\.0.*is one of the model"
    ):
        was_fx.sparsify(gpt2, schedule)


def test_a_search(gemma3, text):
    calibration = was_fx.calibrate(gemma3, text, score=was_fx.Score(0.0, 1))
    schedule = was_fx.search(gemma3, calibration, tokens=text, target=0.5, recipe="teal")
    assert abs(schedule.sparsity - 0.5) < 1e-6
    was_fx.sparsify(gemma3, schedule)
    assert was_fx.check(gemma3).ok


def test_quantised_rows_are_those_of_the_decoder(gemma3):
    was_fx.quantize(gemma3, "int8")
    linears = find_linears(gemma3)
    assert {name for name, each in linears.items() if each.rows is not None} == {*body_linears(gemma3), "lm_head"}
    assert weight_bytes_per_token(gemma3) < 0.6 * weight_bytes_per_token(tiny_model("gemma3"))


@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_an_encoder_decoder_model_is_refused_in_one_sentence(name, text):
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with pytest.raises(ValueError, match="is an encoder-decoder model, which was-fx leaves alone"):
        was_fx.calibrate(model, text)

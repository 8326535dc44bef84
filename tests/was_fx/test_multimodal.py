"""Multimodal models: their text decoder is made sparse, their towers are left alone. Small ones with random weights."""

import copy
from collections.abc import Sequence

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


def about_images(model, text):
    """What a processor would return for two conversations of different lengths."""
    first, second = image_prompt(model, text[:1, :8]), image_prompt(model, text[1:2, :19])
    second["pixel_values"] = second["pixel_values"].flip(-1)
    return [first, second]


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "llava"])
def test_thresholds_are_measured_on_image_tokens_too(model_type, text):
    model = tiny_model(model_type)
    given = about_images(model, text)
    found = was_fx.calibrate(model, given, score=was_fx.Score(0.0, 1))
    assert found.tokens == sum(each["input_ids"].numel() for each in given)
    name = next(name for name in found.thresholds if name.endswith("layers.1.mlp.down_proj"))
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten()))
    with torch.no_grad():
        for each in given:
            model(**each)
    handle.remove()
    share = (torch.cat(seen).abs() <= found.threshold(name, 0.5)).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.003)
    alone = was_fx.calibrate(model, [each["input_ids"][0] for each in given], score=was_fx.Score(0.0, 1))
    assert not alone.thresholds[name].equal(found.thresholds[name])
    assert was_fx.calibrate(model, given[0]).tokens == given[0]["input_ids"].numel()


def test_images_and_texts_together_one_by_one(gemma3, text):
    given, asked, steps = about_images(gemma3, text), [], []

    class OneByOne(Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            asked.append(index)
            return (*given, text[2])[index]

    found = was_fx.calibrate(gemma3, OneByOne(), progress=lambda *step: steps.append((*step, max(asked))))
    assert steps == [(1, 3, 0), (2, 3, 1), (3, 3, 2)]
    assert found.thresholds.keys() == body_linears(gemma3).keys()
    assert found.tokens == sum(each["input_ids"].numel() for each in given) + len(text[2])


def test_fisher_weights_and_thresholds_of_the_sparse_model_about_images(gemma3, text):
    given = about_images(gemma3, text)
    calibration = was_fx.calibrate(gemma3, given, fisher=True)
    before = was_fx.fisher(calibration, 0.5)
    after = was_fx.recalibrate(gemma3, was_fx.uniform(calibration, 0.5), given, rounds=1)
    was_fx.sparsify(gemma3, before)
    assert was_fx.check(gemma3).ok
    assert after != was_fx.uniform(calibration, 0.5)
    whole = was_fx.calibrate(was_fx.densify(gemma3), given[0], fisher=True)  # one batch, which has no third
    assert whole.fisher is not None


def test_pixels_get_the_dtype_of_the_model(text):
    model = tiny_model("llava").bfloat16()
    given = image_prompt(tiny_model("llava"), text[:1, :8])
    assert given["pixel_values"].dtype == torch.float32
    assert was_fx.calibrate(model, given).tokens == given["input_ids"].numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda each: {**each, "attention_mask": each["attention_mask"].clone().fill_(0)},
            "has a mapping with padding",
        ),
        (
            lambda each: {**each, "pixel_values": each["pixel_values"].tolist()},
            "pixel_values is no tensor; call the pro",
        ),
        (lambda each: {**each, "input_features": torch.ones(1, 2, 2)}, "has input_features, which Gemma3ForCondit"),
        (lambda each: {**each, "input_ids": each["input_ids"] + TEXT + 100}, "the model's vocabulary is 0 to 127"),
        (lambda each: {"pixel_values": each["pixel_values"]}, "expected 'input_ids'"),
    ],
)
def test_images_that_are_refused(gemma3, text, change, message):
    given = about_images(gemma3, text)
    for wrong in (change(given[0]), [given[1], change(given[0])]):
        with pytest.raises(ValueError, match=message):
            was_fx.calibrate(gemma3, wrong)


def test_a_model_of_text_refuses_images(gemma3, text, llama):
    with pytest.raises(ValueError, match="has pixel_values, which LlamaForCausalLM doesn't take; load the multimodal"):
        was_fx.calibrate(llama, image_prompt(gemma3, text[:1, :8]))


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

"""Quantised models: made, sparsified, copied, moved to other dtypes, saved and loaded; and what is refused."""

import contextlib
import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import was_fx
from was_fx.modules.quantized_embedding import embedding_formats
from was_fx.modules.quantized_linear import QuantizedLinear, quantized_linears, weight_formats
from was_fx.searching.workers import checkpoint_of

MIXED = {"*mlp*": "int4-64", "lm_head": "int8"}


def small(tied=False, outputs=128):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=outputs,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 128, (1, 12), generator=torch.Generator().manual_seed(1))


def decoded(model, ids):
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def sparse(model):
    tokens = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(2))
    return was_fx.sparsify(model, was_fx.uniform(was_fx.calibrate(model, tokens), 0.5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("weights", "loss"), [("int8", 0.04), ("int4", 0.3), (MIXED, 0.3)], ids=str)
def test_a_quantised_model_is_near_and_is_saved_and_loaded_bit_by_bit(weights, loss, tied, ids, tmp_path):
    model = small(tied)
    dense = model(ids).logits
    was_fx.quantize(model, weights)
    logits = model(ids).logits
    assert 0 < (logits - dense).norm() / dense.norm() < loss
    sparse(model)
    text = decoded(model, ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(decoded(again, ids), text)
    held = sum(tensor.numel() * tensor.element_size() for tensor in before.values())
    assert (tmp_path / "model.safetensors").stat().st_size < held + 20_000


def test_without_a_schedule_it_is_saved_and_loaded_too(ids, tmp_path):
    model = was_fx.quantize(small(), "int8")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert len(quantized_linears(again)) == 15


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_sparse_and_quantised(through, ids):
    model = sparse(was_fx.quantize(small(), "int4"))
    again = through(model)
    assert torch.equal(decoded(again, ids), decoded(model, ids))
    assert len(quantized_linears(again)) == 15


def test_check_names_the_kernel_and_densify_leaves_the_format(ids):
    model = was_fx.sparsify(was_fx.quantize(small(), "int8"), sparse_schedule("int8"))
    report = was_fx.check(model)
    assert {row.implementation for row in report.linears} <= {"cpu_quantized", "dequantised_product"}
    assert not any(row.dense for row in report.linears)
    was_fx.densify(model)
    assert all(type(module).__name__ == "QuantizedLinear" for module in quantized_linears(model).values())
    assert model(ids).logits.isfinite().all()


def sparse_schedule(weights=None):
    model = small() if weights is None else was_fx.quantize(small(), weights)
    return was_fx.uniform(was_fx.calibrate(model, torch.randint(0, 128, (4, 32))), 0.5)


def test_scales_stay_fp32_in_any_dtype(ids):
    model = was_fx.quantize(small(), "int4")
    scales = model.model.layers[0].mlp.up_proj.scales.clone()
    model.float()
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, QuantizedLinear)
    assert torch.equal(linear.scales, scales)
    assert linear.weight.dtype == torch.float32
    assert model(ids).logits.dtype == torch.float32


def test_int4_fitted_to_a_text_is_nearer_on_it(ids):
    tokens = torch.randint(0, 128, (32, 32), generator=torch.Generator().manual_seed(3))
    expected = small()(tokens).logits
    found = [was_fx.quantize(small(), "int4", tokens=each)(tokens).logits for each in (None, tokens)]
    by_itself, fitted = ((logits - expected).norm() for logits in found)
    assert fitted < 0.9 * by_itself


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("int3", "int3.*expected one of int8, int4"),
        ({"*.nothing": "int8"}, "nothing.*fits no Linear"),
        ("int4-128", "groups of 128 don't divide; choose int8"),
    ],
)
def test_what_can_not_be_is_refused_and_the_model_untouched(weights, words, ids):
    model = small(outputs=96)
    before = model(ids).logits
    with pytest.raises(ValueError, match=words):
        was_fx.quantize(model, weights)
    assert not quantized_linears(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_weight_that_is_not_finite_is_refused_and_the_model_untouched(name, value, weights, ids):
    model = small()
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = value
    with pytest.raises(ValueError, match=rf"{name}: the weight holds NaN or inf"):
        was_fx.quantize(model, weights, tokens=ids)
    assert not quantized_linears(model)
    assert not embedding_formats(model)


def test_a_sparsified_model_is_refused():
    with pytest.raises(ValueError, match="densify"):
        was_fx.quantize(sparse(small()))


def test_a_checkpoint_with_scales_of_nan_is_refused(tmp_path):
    model = was_fx.quantize(small(), "int8")
    model.model.layers[0].mlp.up_proj.scales[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="up_proj: scales are not all positive finite"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("made_with", "used_with", "words"),
    [
        (None, "int8", r"weights not quantised, and those of the model are int8 \(15 Linears\)"),
        ("int8", None, r"weights int8 \(15 Linears\), and those of the model are not quantised"),
        ("int8", "int4", r"int8 \(15 Linears\), and those of the model are int4-32 \(14 Linears\), int8 \(1\)"),
        ("int8", "int8", ""),
    ],
)
def test_a_schedule_that_was_made_with_other_weights_is_warned_of(made_with, used_with, words, tmp_path):
    sparse_schedule(made_with).save(tmp_path / "s.safetensors")
    schedule = was_fx.Schedule.load(tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match=words) if words else contextlib.nullcontext():
        model = was_fx.sparsify(small(), schedule, weights=used_with)
    was_fx.densify(model)
    again = was_fx.recalibrate(model, schedule, torch.randint(0, 128, (4, 32)), rounds=1)
    was_fx.sparsify(model, again)  # measured on this model
    was_fx.sparsify(small() if used_with is None else model, schedule.replace({}, weights=None))  # not known


def test_a_linear_that_has_another_format_already_is_refused(ids):
    model = was_fx.quantize(small(), "int8")
    before = model(ids).logits
    with pytest.raises(ValueError, match="q_proj is int8 already, and can't become int4-32"):
        was_fx.quantize(model, "int4")
    assert torch.equal(was_fx.quantize(model, "int8")(ids).logits, before)


@pytest.mark.parametrize("weights", [{"*": "int4", "lm_head": "none"}, {"lm_head": "none", "*": "int4"}])
def test_a_star_is_for_what_no_other_pattern_fits(weights):
    formats = weight_formats(was_fx.quantize(small(), weights))
    assert "lm_head" not in formats
    assert set(formats.values()) == {"int4-32"}
    assert weight_formats(was_fx.quantize(small(), {"*": "int4"}))["lm_head"] == "int8"


def test_what_became_of_each_weight_is_told():
    model, told, steps = small(), [], []
    before = {name: module.weight.detach().float() for name, module in model.named_modules() if "proj" in name}
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(3))
    was_fx.quantize(model, "int4", tokens=tokens, told=told.append, progress=lambda *step: steps.append(step))
    assert steps == [(done, 16) for done in range(1, 17)]
    assert {each.name: each.format for each in told} == weight_formats(model) | embedding_formats(model)
    for each in told:
        if each.name in before:
            w = before[each.name]
            assert (each.count, each.before, each.after) == (
                w.numel(),
                2 * w.numel(),
                model.get_submodule(each.name).was_rows.nbytes,
            )
            off = (model.get_submodule(each.name).weight.float() - w).square().sum()
            torch.testing.assert_close(torch.tensor(each.off / each.size), off / w.square().sum())
            assert 0 < each.outputs_off / each.outputs_size < 0.02
        else:
            assert each.name in ("lm_head", "model.embed_tokens")
            assert each.outputs_size == 0


def test_workers_can_t_find_a_model_that_was_quantised_in_memory(tmp_path):
    small().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert checkpoint_of(model) == str(tmp_path)
    with pytest.raises(ValueError, match="comes from no checkpoint"):
        checkpoint_of(was_fx.quantize(model))

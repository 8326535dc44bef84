"""`from_pretrained` with a `WasConfig`, or of a checkpoint that names a schedule."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.auto import AutoHfQuantizer

import was_fx
from was_fx.generate.generation import Generation
from was_fx.plugins.quantizer import WasQuantizer
from was_fx.sparse.saving import SCHEDULE_FILE
from was_fx.sparse.state import sparse_state

BOTH = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(scope="module")
def schedule(calibration):
    return was_fx.uniform(calibration, target=0.5)


@pytest.fixture(scope="module")
def dense(_llama, tmp_path_factory):
    """A folder with the dense model."""
    folder = tmp_path_factory.mktemp("dense")
    _llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(_llama, schedule, tmp_path_factory):
    """A folder with the same model, sparsified."""
    folder = tmp_path_factory.mktemp("saved")
    was_fx.sparsify(copy.deepcopy(_llama), schedule, prefill="half").save_pretrained(folder)
    return folder


def load(folder, config=None):
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **given)


@pytest.mark.parametrize("as_path", [False, True])
def test_a_dense_checkpoint_with_a_schedule(dense, schedule, oracle, llama, tokens, tmp_path, as_path):
    schedule.save(tmp_path / "s.safetensors")
    config = was_fx.WasConfig(tmp_path / "s.safetensors" if as_path else schedule, prefill="all", lowering="eager")
    model = load(dense, config)
    state = sparse_state(model)
    assert (state.schedule, state.rule.prefill, model.generate.settings[1]) == (schedule, "all", "eager")
    with torch.no_grad():
        expected = oracle(llama, schedule)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, atol=2e-4, rtol=1e-4)


def test_a_path_in_a_config_for_a_dense_checkpoint_is_not_looked_for_beside_it(dense, schedule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule.save(tmp_path / "here.safetensors")
    assert sparse_state(load(dense, was_fx.WasConfig("here.safetensors"))).schedule == schedule


def test_a_saved_checkpoint_says_it_all(saved, schedule):
    model = load(saved)
    state = sparse_state(model)
    assert (state.schedule, state.rule.prefill, model.generate.settings[1]) == (schedule, "half", None)


@BOTH
def test_given_attributes_win_over_the_checkpoints_own(saved, schedule, calibration, tmp_path):
    other = was_fx.uniform(calibration, 0.3)
    model = load(saved, was_fx.WasConfig(other, prefill="all", lowering="eager"))
    state = sparse_state(model)
    assert (state.schedule, state.rule.prefill, model.generate.settings[1]) == (other, "all", "eager")
    other.save(tmp_path / "other.safetensors")
    state = sparse_state(load(saved, was_fx.WasConfig(str(tmp_path / "other.safetensors"))))
    assert (state.schedule, state.rule.prefill) == (other, "dense")


@BOTH
def test_without_a_schedule_of_its_own_the_given_config_means_the_one_beside_the_checkpoint(saved, schedule):
    state = sparse_state(load(saved, was_fx.WasConfig(prefill="all")))
    assert (state.schedule, state.rule.prefill) == (schedule, "all")


@BOTH
@pytest.mark.parametrize("allowed", [False, True])
def test_allowing_another_model_is_given_too(saved, dense, tmp_path, allowed):
    """The checkpoint's weights were changed after it was saved."""
    folder = shutil.copytree(saved, tmp_path / "changed")
    model = load(dense)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", folder)
    config = was_fx.WasConfig(allow_other_model=allowed)
    if allowed:
        assert sparse_state(load(folder, config)) is not None
    else:
        with pytest.raises(was_fx.ScheduleError, match="another model"):
            load(folder, config)


@BOTH
def test_transformers_merges_our_attributes():
    """It asks only the classes of a constant of its own."""
    assert was_fx.WasConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    saved = {"quant_method": "was", "schedule": "a.safetensors", "prefill": "half", "was_fx_version": "0.1.0"}
    given = was_fx.WasConfig("b.safetensors", prefill="all", lowering="inductor", allow_other_model=True)
    merged = AutoHfQuantizer.merge_quantization_configs(saved, given)
    assert type(merged) is was_fx.WasConfig
    found = (merged.schedule, merged.prefill, merged.lowering, merged.allow_other_model, merged.was_fx_version)
    assert found == ("b.safetensors", "all", "inductor", True, "0.1.0")


@pytest.mark.filterwarnings("ignore:.*Torch was not compiled:UserWarning")
def test_lowering_reaches_sparsify(dense, schedule):
    model = load(dense, was_fx.WasConfig(schedule, lowering="eager"))
    assert isinstance(model.generate, Generation)
    assert model.generate.settings[1] == "eager"


def test_what_is_loaded_is_free_of_the_quantizer(saved):
    model = load(saved)
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert model.train() is model


def test_what_transformers_asks_a_quantizer(schedule):
    quantizer = WasQuantizer(was_fx.WasConfig(schedule))
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert not quantizer.is_trainable
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "was"})


@pytest.mark.parametrize("as_path", [False, True])
def test_a_config_as_json(schedule, as_path):
    config = was_fx.WasConfig("own.safetensors" if as_path else schedule, prefill="all", lowering="eager")
    found = json.loads(config.to_json_string(use_diff=False))
    name = "own.safetensors" if as_path else SCHEDULE_FILE
    expected = {"quant_method": "was", "schedule": name, "prefill": "all", "was_fx_version": was_fx.__version__}
    assert found == expected
    assert was_fx.WasConfig.from_dict(found).to_dict() == found


def test_a_checkpoint_without_its_schedule_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "saved")
    (folder / SCHEDULE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="there is no was-fx schedule here"):
        load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"bits": 4, "was_fx_version": "9.9"}, r"has no 'bits'.*another version of was-fx \(9\.9\)"),
        ({"executor": "eager"}, "WasConfig has no 'executor'"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        was_fx.WasConfig(**arguments)


def test_a_checkpoint_names_no_file_elsewhere(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["schedule"] = "../schedule.was.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the name of a file beside it"):
        load(folder)

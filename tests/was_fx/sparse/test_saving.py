"""save_pretrained and push_to_hub of a sparsified model, and from_pretrained of what they wrote."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.hub import PushToHubMixin

import was_fx
from was_fx.plugins.quantizer import SCHEDULE_FILE
from was_fx.sparse.sparsify import sparse_state

ALL = {"prefill": "all"}


@pytest.fixture(scope="module")
def schedule(calibration):
    return was_fx.uniform(calibration, target=0.5)


@pytest.fixture(scope="module")
def saved(_llama, schedule, tmp_path_factory):
    """A folder that `llama` was saved to, sparsified."""
    folder = tmp_path_factory.mktemp("saved")
    was_fx.sparsify(copy.deepcopy(_llama), schedule, **ALL).save_pretrained(folder)
    return folder


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_checkpoint_is_the_dense_one_byte_for_byte(kind, tied, tokens, tmp_path):
    torch.manual_seed(0)
    size = {"vocab_size": 128, "tie_word_embeddings": tied}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **size)).eval()
    else:
        few = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**few, **size)).eval()
    model.save_pretrained(tmp_path / "dense")
    was_fx.sparsify(model, was_fx.uniform(was_fx.calibrate(model, tokens[:, :32]), target=0.5), **ALL)
    model.save_pretrained(tmp_path / "sparse")
    names = [path.name for path in (tmp_path / "sparse").iterdir()]
    assert sorted(names) == ["config.json", "generation_config.json", "model.safetensors", SCHEDULE_FILE]
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "sparse" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    found = config_of(tmp_path / "sparse")
    del found["quantization_config"]
    assert found == config_of(tmp_path / "dense")


def test_the_config_names_the_schedule(saved, schedule):
    assert config_of(saved)["quantization_config"] == {
        "quant_method": "was",
        "schedule": SCHEDULE_FILE,
        "prefill": "all",
        "was_fx_version": was_fx.__version__,
    }
    assert was_fx.Schedule.load(saved / SCHEDULE_FILE) == schedule


def test_shards_hold_the_dense_weights(llama, schedule, tmp_path):
    before = copy.deepcopy(llama.state_dict())
    was_fx.sparsify(llama, schedule, **ALL)
    llama.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = was_fx.densify(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(loaded.state_dict()[name].equal(weight) for name, weight in before.items())


def test_from_pretrained_returns_it_sparsified(llama, saved, schedule, oracle, tokens):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert type(loaded) is type(llama)
    state = sparse_state(loaded)
    assert state.schedule == schedule
    assert state.rule.prefill == "all"
    torch.testing.assert_close(logits(loaded, tokens), logits(oracle(llama, schedule), tokens), atol=2e-4, rtol=1e-4)


def test_what_was_loaded_saves_the_same_again(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_was_loaded_has_the_freedoms_of_a_dense_model(saved, tokens):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert not hasattr(loaded.config, "quantization_config")
    assert getattr(loaded, "hf_quantizer", None) is None
    loaded.double()
    dense = was_fx.densify(loaded)
    assert logits(dense, tokens).dtype == torch.float64


def test_a_densified_model_saves_a_dense_checkpoint(saved, tmp_path):
    was_fx.densify(AutoModelForCausalLM.from_pretrained(saved)).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert not (tmp_path / "dense" / SCHEDULE_FILE).exists()


def test_a_copy_saves_itself(llama, schedule, tmp_path):
    copied = copy.deepcopy(was_fx.sparsify(llama, schedule, **ALL))
    with torch.no_grad():
        copied.model.norm.weight.fill_(3.0)
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.norm.weight.eq(3.0).all()
    assert sparse_state(loaded).schedule == schedule
    assert not llama.model.norm.weight.eq(3.0).any()


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_changed_are_saved_with_the_schedule_of_those_before(
    llama, schedule, oracle, tokens, tmp_path, caplog, when
):
    """It is told, it loads all the same, and the schedule still says whose it is."""

    def change(model):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)

    dense = copy.deepcopy(llama)
    change(dense)
    if when == "before":
        change(llama)
    was_fx.sparsify(llama, schedule, allow_other_model=True, **ALL)
    if when == "after":
        change(llama)
    with caplog.at_level("WARNING", logger="was_fx"):
        llama.save_pretrained(tmp_path)
    (record,) = [each for each in caplog.records if each.name.startswith("was_fx")]
    assert "no longer the one that its schedule was made for (the weights have other values" in record.getMessage()
    assert config_of(tmp_path)["quantization_config"]["allow_other_model"] is True
    assert was_fx.Schedule.load(tmp_path / SCHEDULE_FILE).metadata.fingerprint == schedule.metadata.fingerprint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(oracle(dense, schedule), tokens), atol=2e-4, rtol=1e-4)


def test_a_schedule_without_a_fingerprint_gets_that_of_the_model(llama, schedule, tmp_path):
    was_fx.sparsify(llama, schedule.replace({}, fingerprint={}), **ALL).save_pretrained(tmp_path)
    assert was_fx.Schedule.load(tmp_path / SCHEDULE_FILE).metadata.fingerprint == schedule.metadata.fingerprint
    assert "allow_other_model" not in config_of(tmp_path)["quantization_config"]


LOGITS = """
import sys, torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
state = getattr(model, "_was_state", None)
if state is None:
    with torch.no_grad():
        torch.save(model(torch.arange(2, 30)[None]).logits, sys.argv[2])
print(type(state).__name__, "was_fx" in sys.modules)
"""


@pytest.mark.parametrize(
    ("imports", "printed"),
    [
        ("from transformers import AutoModelForCausalLM", "NoneType False"),
        ("import was_fx; from transformers import AutoModelForCausalLM", "SparseState True"),
    ],
    ids=["without was-fx", "with was-fx"],  # imported after transformers: the other tests of this file
)
def test_another_process_loads_it(llama, saved, tmp_path, imports, printed):
    command = [sys.executable, "-c", LOGITS.format(imports=imports), str(saved), str(tmp_path / "logits.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == printed
    if printed.startswith("NoneType"):
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(llama, torch.arange(2, 30)[None]))


def test_what_is_uploaded_holds_the_schedule_and_a_card(llama, schedule, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", lambda self, *given, **named: uploads.append(given))
    was_fx.sparsify(llama, schedule, **ALL)
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n# My model\nIs good.\n")
    for _ in range(2):
        llama._upload_modified_files(str(tmp_path), "me/my-model", {})
    assert uploads == [(str(tmp_path), "me/my-model", {})] * 2
    assert was_fx.Schedule.load(tmp_path / SCHEDULE_FILE) == schedule
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["mine", "was-fx", "activation-sparsity"]
    assert card.text.count("## Sparse decoding") == 1
    assert "# My model\nIs good." in card.text
    assert "from_pretrained('me/my-model')" in card.text
    assert "| 0–1 | 50.0 | 50.0 |" in card.text

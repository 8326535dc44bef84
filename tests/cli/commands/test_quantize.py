"""`was quantize`, and what it writes as the input of the other commands."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import was_fx
from was_fx.modules.quantized_embedding import embedding_formats
from was_fx.modules.quantized_linear import quantized_linears, weight_formats


def formats(path) -> dict[str, str]:
    return weight_formats(AutoModelForCausalLM.from_pretrained(path))


def test_writes_a_checkpoint_that_other_commands_read(was, other_model, text, tmp_path):
    out = tmp_path / "q"
    outcome = was("quantize", other_model, "--weights", "int8", "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json
    assert (found["path"], found["text"]) == (str(out), None)
    quantised, kept = found["formats"]
    assert (quantised["format"], quantised["weights"], kept["format"]) == ("int8", 16, "as before")
    assert 0 < quantised["error"] < 0.01
    assert quantised["output_error"] is None
    assert quantised["bytes_before"] > 3.5 * quantised["bytes_after"]
    assert found["bytes_after"] == quantised["bytes_after"] + kept["bytes_after"]
    assert set(formats(out).values()) == {"int8"}
    ppl = was("ppl", out, "--text", text, "--length", 64, "--json")
    dense = was("ppl", other_model, "--text", text, "--length", 64, "--json")
    expected = dense.json["results"][0]["perplexity"]
    assert ppl.json["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_a_text_fits_int4_to_its_inputs(was, other_model, text, tmp_path):
    arguments = ("quantize", other_model, "--weights", "int4", "--json", "--out")
    alone = was(*arguments, tmp_path / "alone").json
    fitted = was(*arguments, tmp_path / "fitted", "--text", text, "--length", 64, "--tokens", 256).json
    assert (fitted["text"], fitted["tokens"], alone["tokens"]) == (str(text), 256, 0)
    by_format = {row["format"]: row for row in fitted["formats"]}
    assert by_format["int4-32"]["weights"] == 15  # the embeddings too
    assert 0 < by_format["int4-32"]["output_error"] < by_format["int4-32"]["error"]
    assert by_format["int8"]["output_error"] is None
    weights = [load_file(tmp_path / each / "model.safetensors") for each in ("alone", "fitted")]
    name = "model.layers.0.mlp.up_proj.codes"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_table_fits_eighty_columns_and_says_what_to_do_next(was, other_model, text, tmp_path):
    out = tmp_path / "q"
    arguments = ("--weights", "int4", "--weights", "*.down_proj=int8", "--weights", "lm_head=none", "--text", text)
    outcome = was("quantize", other_model, *arguments, "--out", out)
    assert outcome.code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert max(len(line) for line in lines if str(out) not in line) <= 80
    lines = [line.split() for line in lines]
    assert [line[:2] for line in lines if line and line[0].startswith("int")] == [["int4-32", "13"], ["int8", "2"]]
    assert f"was calibrate {out} --text" in outcome.stdout
    assert "lm_head" not in formats(out)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_embeddings_follow_the_head_and_that_is_said(was, other_model, tmp_path, tied):
    config = LlamaConfig.from_pretrained(other_model, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for tokenizer in other_model.glob("tokenizer*"):
        shutil.copy(tokenizer, tmp_path / "model")
    outcome = was("quantize", tmp_path / "model", "--weights", "lm_head=int8", "--out", tmp_path / "q")
    assert outcome.code == 0, outcome.stderr
    assert ("The input embeddings are tied to the head, and read its codes" in outcome.stdout) == tied
    assert formats(tmp_path / "q") == {"lm_head": "int8"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert embedding_formats(again) == ({"model.embed_tokens": "tied"} if tied else {})


def test_patterns_come_before_what_is_for_all_others(was, other_model, tmp_path):
    arguments = ("--weights", "int8", "--weights", "*.layers.0.*=none", "--weights", "*.up_proj=int4-64")
    assert was("quantize", other_model, *arguments, "--out", tmp_path / "q").code == 0
    found = formats(tmp_path / "q")
    assert not any(".layers.0." in name for name in found)
    assert found["model.layers.1.mlp.up_proj"] == "int4-64"
    assert found["model.layers.1.mlp.down_proj"] == found["lm_head"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--weights", "int3"], 2, "the format of weights is 'int3'; expected one of int8, int4, int4-32"),
        (["--weights", "*.up_proj=fp8"], 2, "'fp8'; expected one of int8"),
        (["--weights", "int8", "--weights", "int4"], 2, "the format of all Linears is given twice: int8, int4"),
        (["--weights", "a=int8", "--weights", "a=int8"], 2, "the format of 'a' is given twice"),
        ([], 2, "--weights"),
        (["--weights", "*.nothing=int8"], 1, "'*.nothing', which fits no Linear; there is model.layers.0"),
        (["--weights", "int4-128"], 1, "32 outputs, which groups of 128 don't divide; choose int8 for it, such as "),
        (["--weights", "int4-128"], 1, "--weights model.layers.0.self_attn.q_proj=int8 --weights int4"),
        (["--weights", "int4", "--text", "none.txt"], 1, "none.txt: No such file"),
        (["--weights", "int8", "--out", "{tmp}/none/q"], 1, "none/q: cannot be written; choose an existing directory"),
        (["--weights", "int8", "--out", "{tmp}/mine"], 1, "mine: exists already; give another --out, or --force"),
        (["--weights", "int8", "--out", "{tmp}/mine", "--force"], 1, "mine: is no model that was-fx saved"),
        (["--weights", "int8", "--out", "{model}", "--force"], 1, "is the model that is read; give another --out"),
    ],
)
def test_refusals(was, other_model, tmp_path, arguments, code, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    arguments = [each.replace("{tmp}", str(tmp_path)).replace("{model}", str(other_model)) for each in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "q")]
    outcome = was("quantize", other_model, *arguments)
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(was, other_model, tmp_path, value):
    model = shutil.copytree(other_model, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = was("quantize", model, "--weights", "int4", "--out", tmp_path / "q")
    assert outcome.code == 1
    assert "model.layers.1.mlp.up_proj: the weight holds NaN or inf" in outcome.error
    assert not (tmp_path / "q").exists()


@pytest.fixture
def quantised(was, other_model, tmp_path):
    """A folder that `was quantize` wrote."""
    out = tmp_path / "quantised"
    assert was("quantize", other_model, "--weights", "int8", "--out", out).code == 0
    return out


def test_a_model_that_is_quantised_already_is_refused(was, quantised, tmp_path):
    outcome = was("quantize", quantised, "--weights", "int4", "--out", tmp_path / "q")
    assert outcome.code == 1
    assert f"{quantised} is quantised already (int8)" in outcome.error.replace("\n", " ")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("how", ["cut", "codes of another shape", "a tensor missing"])
def test_a_damaged_file_is_refused(was, quantised, text, how):
    file = quantised / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        tensors = load_file(file)
        codes = tensors.pop("model.layers.1.mlp.up_proj.codes")
        if how == "codes of another shape":
            tensors["model.layers.1.mlp.up_proj.codes"] = codes[:-1].contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    outcome = was("ppl", quantised, "--text", text, "--length", 64)
    assert outcome.code == 1
    assert f"the model of {quantised} could not be loaded" in " ".join(outcome.error.split())
    assert outcome.stdout == ""


def test_force_replaces_what_was_fx_wrote(was, other_model, quantised):
    outcome = was("quantize", other_model, "--weights", "int4", "--out", quantised, "--force")
    assert outcome.code == 0, outcome.stderr
    assert formats(quantised)["model.layers.0.mlp.up_proj"] == "int4-32"
    assert len(list(quantised.parent.iterdir())) == 1


@pytest.mark.parametrize("force", [False, True])
def test_an_interruption_leaves_what_was_there(was, other_model, quantised, monkeypatch, force):
    from transformers import PreTrainedTokenizerBase

    def interrupted(self, folder, **_):
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)
    out = quantised if force else quantised.with_name("new")
    outcome = was("quantize", other_model, "--weights", "int4", "--out", out, *(["--force"] if force else []))
    assert outcome.code == 130
    assert list(quantised.parent.iterdir()) == [quantised]
    assert set(formats(quantised).values()) == {"int8"}


def test_a_saved_schedule_is_left_out_and_said_so(was, other_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(other_model)
    calibration = was_fx.calibrate(model, torch.randint(2, 4096, (2, 64)))
    sparse = shutil.copytree(other_model, tmp_path / "sparse")
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5)).save_pretrained(sparse)
    outcome = was("quantize", sparse, "--weights", "int8", "--out", tmp_path / "q")
    assert outcome.code == 0, outcome.stderr
    assert "was saved with a schedule" in outcome.stderr
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["schedule"] is None
    assert len(quantized_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "q"))) == 15

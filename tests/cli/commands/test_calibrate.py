"""`was calibrate`."""

import re

import pytest
from transformers import AutoModelForCausalLM

from was_fx import Calibration, Score


def test_writes_a_calibration_and_says_what_to_do_next(was, tmp_path):
    out = tmp_path / "c.safetensors"
    outcome = was("calibrate", "embedded", "--tokens", 600, "--length", 256, "--score", "teal", "--out", out)
    assert outcome.code == 0
    found = Calibration.load(out)
    assert (found.tokens, found.text, found.score) == (512, "embedded:calibration", Score.named("teal"))
    assert "42 Linears, 512 tokens" in outcome.stdout
    assert f"was make {out} --target" in outcome.stdout.replace("'", "")


def test_measures_a_model_directory_on_a_file_with_an_own_score(was, tmp_path, other_model, text):
    out = tmp_path / "c.safetensors"
    arguments = ("--text", text, "--exponent", 0.5, "--norm", 2, "--out", out, "--json")
    outcome = was("calibrate", other_model, *arguments)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["score"] == {"exponent": 0.5, "norm": 2}
    assert outcome.json["linears"] == 14
    assert outcome.json["tokens"] % 128 == 0  # windows are no longer than the model's positions
    assert Calibration.load(out).tokens == outcome.json["tokens"]


def test_an_existing_file_is_replaced_with_force_only(was, tmp_path, other_model, text):
    out = tmp_path / "c.safetensors"
    out.write_bytes(b"mine")
    outcome = was("calibrate", other_model, "--text", text, "--out", out)
    assert outcome.code == 1
    assert "--force" in outcome.error
    assert out.read_bytes() == b"mine"
    assert was("calibrate", other_model, "--text", text, "--out", out, "--force").code == 0
    Calibration.load(out)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--text", "{tmp}/none.txt"], 1, "No such file"),
        (["embedded", "--text", "embedded:tset"], 1, "validation"),
        (["embedded", "--text", "{tmp}/latin1.txt"], 1, "not UTF-8"),
        (["embedded", "--text", "{tmp}/short.txt"], 1, "has 3 tokens"),
        (["embedded", "--length", "2000"], 1, "at most 1024"),
        (["embedded", "--tokens", "100"], 1, "less than one window of 512"),
        (["embeded"], 2, "needs a text"),
        (["embeded", "--text", "{tmp}/short.txt"], 1, "did you mean 'embedded'"),
        (["./nowhere", "--text", "{tmp}/short.txt"], 1, "no model directory"),
        (["nobody/nothing", "--text", "{tmp}/short.txt"], 1, "could not be loaded"),
        (["{tmp}/short.txt", "--text", "{tmp}/short.txt"], 1, "is a file, not a model"),
        (["{tmp}", "--text", "{tmp}/short.txt"], 1, "could not be loaded"),
        (["embedded", "--device", "toaster"], 1, "expected cpu, cuda"),
        (["embedded", "--score", "wsa"], 2, "teal"),
        (["embedded", "--score", "was", "--norm", "2"], 2, "either a name"),
        (["embedded", "--exponent", "-1"], 2, "--exponent"),
        (["embedded", "--out", "{tmp}/short.txt/c.safetensors"], 1, "short.txt/c.safetensors"),
        (["embedded", "--out", "{tmp}"], 1, "is a directory"),
    ],
)
def test_refusals(was, tmp_path, arguments, code, message):
    (tmp_path / "short.txt").write_text("Too short", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    arguments = [each.replace("{tmp}", str(tmp_path)) for each in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "c.safetensors")]
    outcome = was("calibrate", *arguments)
    assert outcome.code == code, outcome
    text = outcome.error if code == 1 else outcome.stderr
    assert message in " ".join(text.replace("│", " ").split())
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_the_model_multiplies_by_itself_are_told_with_their_share(was, tmp_path, text):
    from transformers import AutoTokenizer

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    config = tiny_config("mamba")
    config.vocab_size = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(tmp_path / "mamba")
    arguments = ("calibrate", tmp_path / "mamba", "--text", text, "--tokens", 128, "--length", 64)
    outcome = was(*arguments, "--out", tmp_path / "c.safetensors")
    assert outcome.code == 0, outcome.stderr
    told = re.search(
        r"2 Linears of the decoder stay dense, such as \S+dt_proj: ([\d.]+) % of the bytes", outcome.stdout
    )
    outcome = was(*arguments, "--out", tmp_path / "c.safetensors", "--force", "--json")
    assert outcome.json["excluded"] == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert float(told[1]) == pytest.approx(100 * outcome.json["excluded_share"], abs=0.06)
    assert outcome.json["excluded_share"] > 0


def test_a_multimodal_model_has_its_decoder_measured(was, tmp_path, text):
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from was_fx import embedded
    from was_fx.coverage.tiny_models import tiny_config

    config = tiny_config("llava")
    config.text_config.vocab_size = 4096
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "llava")
    AutoTokenizer.from_pretrained(embedded.path()).save_pretrained(tmp_path / "llava")
    out, schedule = tmp_path / "c.safetensors", tmp_path / "s.was.safetensors"
    outcome = was("calibrate", tmp_path / "llava", "--text", text, "--length", 64, "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert "14 Linears, " in outcome.stdout
    assert "14 Linears outside of the text decoder are left out" in outcome.stdout
    assert was("make", out, "--out", schedule, "--target", "50%").code == 0
    outcome = was("check", tmp_path / "llava", "--schedule", schedule, "--json")
    assert outcome.code == 0, outcome.stderr
    assert all(row["name"].startswith("model.language_model.") for row in outcome.json["linears"])

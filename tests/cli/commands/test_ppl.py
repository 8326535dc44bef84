"""`was ppl`."""

import pytest
import torch


def test_json_holds_the_dense_model_and_each_schedule(was, schedule):
    outcome = was("ppl", "embedded", "--schedule", schedule, "--limit", 2, "--length", 128, "--json")
    assert outcome.code == 0, outcome.stderr
    dense, sparse = outcome.json["results"]
    assert (dense["schedule"], dense["realised"], dense["tokens"]) == (None, 0.0, 2 * 127)
    assert sparse["schedule"] == str(schedule)
    assert sparse["nominal"] == 0.5
    assert sparse["realised"] == pytest.approx(0.5, abs=0.05)
    assert 1 < dense["perplexity"] < sparse["perplexity"]


def test_table_fits_eighty_columns(was, schedule):
    outcome = was("ppl", "embedded", "--schedule", schedule, "--limit", 1, "--length", 64)
    assert outcome.code == 0, outcome.stderr
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    assert "63 tokens in windows of 64" in outcome.stdout
    assert "50.0 %" in outcome.stdout


def test_a_schedule_counts_the_same_after_one_of_another_norm(was, schedule, tmp_path):
    wina = tmp_path / "wina.was.safetensors"
    calibration = tmp_path / "wina.safetensors"
    common = ("--limit", 1, "--length", 64, "--json")
    was("calibrate", "embedded", "--score", "wina", "--tokens", 512, "--length", 256, "--out", calibration)
    was("make", calibration, "--target", "0.5", "--out", wina)
    alone = was("ppl", "embedded", "--schedule", wina, *common).json["results"][-1]
    after = was("ppl", "embedded", "--schedule", schedule, "--schedule", wina, *common).json["results"][-1]
    assert after == alone


def test_refuses_the_schedule_of_another_model(was, schedule, other_model, text):
    outcome = was("ppl", other_model, "--schedule", schedule, "--text", text, "--limit", 1)
    assert outcome.code == 1
    assert "does not fit the model" in outcome.error
    assert "model.layers.5.mlp.down_proj" in outcome.error


def test_the_remedy_names_the_option_of_the_command_line(was, schedule, tmp_path):
    from was_fx import Schedule

    found = Schedule.load(schedule)
    stranger = found.replace({}, fingerprint={**found.metadata.fingerprint, "weights": "0" * 64})
    path = tmp_path / "s.was.safetensors"
    stranger.save(path)
    arguments = ("ppl", "embedded", "--schedule", path, "--limit", 1, "--length", 32)
    assert "--allow-other-model skips" in was(*arguments).error
    assert was(*arguments, "--allow-other-model").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--schedule", "{calibration}"], 1, "is a calibration, not a schedule"),
        (["embedded", "--schedule", "none.safetensors"], 1, "there is no was-fx schedule here"),
        (["embedded", "--prefill", "dense"], 2, "sparse"),
        (["embedded", "--limit", "0"], 2, "--limit"),
        (["embedded", "--text", "none.txt"], 1, "none.txt: No such file"),
        (["./model"], 2, "needs a text"),
    ],
)
def test_refusals(was, calibration, arguments, code, message):
    outcome = was("ppl", *[each.replace("{calibration}", str(calibration)) for each in arguments])
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""


def test_a_checkpoint_that_was_saved_sparse_is_dense_here(was, other_model, text, tmp_path):
    """Its schedule is one among those that the command is given."""
    import was_fx
    from was_fx.cli.input.models import load_model

    loaded = load_model(str(other_model), device="cpu")
    calibration = was_fx.calibrate(loaded.model, torch.randint(2, 4096, (2, 64)))
    was_fx.sparsify(loaded.model, was_fx.uniform(calibration, 0.5)).save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    dense = was("ppl", other_model, "--text", text, "--length", 64, "--json")
    saved = was("ppl", tmp_path, "--text", text, "--length", 64, "--json")
    assert saved.json["results"] == dense.json["results"]
    assert "--schedule" in saved.stderr

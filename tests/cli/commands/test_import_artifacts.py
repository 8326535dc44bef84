"""`was import`."""

import json

import pytest
import torch

from was_fx import Schedule
from was_fx.cli.input.files import read_levels


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_release):
    """A release as of WAS for the embedded model: 6 blocks of 256 channels, 768 inside the MLP."""
    from was_fx import embedded

    config = json.loads((embedded.path() / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(0)
    scores = {
        (block, projection): torch.randn(32, inner if projection == "down" else hidden, generator=generator)
        for block in range(config["num_hidden_layers"])
        for projection in ("q", "k", "v", "o", "gate", "up", "down")
    }
    return write_release(tmp_path_factory.mktemp("release"), "was", scores)


def test_a_level_for_all_blocks(was, tmp_path, folder):
    out = tmp_path / "s.was.safetensors"
    outcome = was("import", folder, "--model", "embedded", "--level", "50%", "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert "WAS, 42 Linears at 50.00 %, 50.00 % by true counts" in outcome.stdout
    assert Schedule.load(out).metadata.calibration_tokens == 32


def test_the_schedule_fits_the_model_that_was_named(was, tmp_path, folder):
    out = tmp_path / "s.was.safetensors"
    assert was("import", folder, "--model", "embedded", "--level", "0.2", "--out", out).code == 0
    outcome = was("ppl", "embedded", "--schedule", out, "--limit", 1, "--length", 32, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["results"][1]["nominal"] == pytest.approx(0.2)


def test_a_level_for_each_block(was, tmp_path, folder):
    blocks = tmp_path / "blocks.json"
    blocks.write_text(json.dumps([0.4, 0.45, 0.5, 0.5, 0.55, 0.6]))
    out = tmp_path / "s.was.safetensors"
    found = was("import", folder, "--model", "embedded", "--blocks", blocks, "--out", out, "--json").json
    assert found == {
        "path": str(out),
        "method": "was",
        "level": pytest.approx(0.5),
        "nominal": pytest.approx(0.5),
        "linears": 42,
    }
    assert Schedule.load(out).linears["model.layers.5.mlp.up_proj"].sparsity == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "embedded"], 2, "give either --level or --blocks"),
        (["--model", "embedded", "--level", "0.5", "--blocks", "x"], 2, "give either --level or --blocks"),
        (["--level", "0.5"], 2, "--model"),
        (["--model", "embedded", "--level", "0.95"], 1, "outside the table"),
        (["--model", "embeded", "--level", "0.5"], 1, "did you mean 'embedded'"),
        (["--model", "{other}", "--level", "0.5"], 1, "layer-5, but the model has only 2"),
        (["--model", "{empty}", "--level", "0.5"], 1, "the configuration of"),
        (["--model", "embedded", "--blocks", "{empty}/none.json"], 1, "No such file"),
    ],
)
def test_refusals(was, tmp_path, folder, other_model, arguments, code, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "s.safetensors"
    arguments = [each.replace("{other}", str(other_model)).replace("{empty}", str(empty)) for each in arguments]
    outcome = was("import", folder, *arguments, "--out", out)
    assert outcome.code == code, outcome
    text = outcome.error if code == 1 else outcome.stderr
    assert message in " ".join(text.replace("│", " ").split())
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0.5,", "is not JSON"),
        ('{"0.5": [0.5]}', "expected a JSON list of levels"),
        ("[]", "expected a JSON list of levels"),
        ("[0.5, 1.5]", "1.5' is no level"),
        ("[0.5, true]", "True' is no level"),
        ("[NaN]", "nan' is no level"),
    ],
)
def test_block_lists_that_are_none(tmp_path, text, message):
    path = tmp_path / "blocks.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_levels(path)

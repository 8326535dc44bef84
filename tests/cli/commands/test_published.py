"""`was published`."""

import pytest

from was_fx import Schedule, load_published


def test_list_has_both_levels_of_each(was):
    outcome = was("published", "list")
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert ["was-llama-2-7b-60", "meta-llama/Llama-2-7b-hf", "60", "%", "54.1", "%"] in rows
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    listed = was("published", "list", "--json").json["schedules"]
    assert len(listed) == 15
    assert {"name", "model", "level", "level_by_true_counts", "licence", "nominal"} <= set(listed[0])


def test_show_is_a_table_with_its_source(was):
    outcome = was("published", "show", "was-llama-2-7b-60")
    assert outcome.code == 0
    assert "54.10 % nominal, target 60 %" in outcome.stdout
    assert "WAS for meta-llama/Llama-2-7b-hf, released as 60 %" in outcome.stdout
    assert "LlamaForCausalLM, by its shapes only" in outcome.stdout
    threshold = load_published("was-llama-2-7b-60").linears["model.layers.7.mlp.up_proj"].threshold
    assert f"{threshold:#.3g}" in was("published", "show", "was-llama-2-7b-60", "--thresholds").stdout
    found = was("published", "show", "was-llama-2-7b-60", "--json").json
    assert (found["level"], len(found["linears"])) == (0.6, 224)


def test_export_writes_the_same_schedule(was, tmp_path):
    out = tmp_path / "s.was.safetensors"
    outcome = was("published", "export", "teal-mistral-7b-50", "--out", out)
    assert outcome.code == 0
    assert Schedule.load(out) == load_published("teal-mistral-7b-50")
    assert "was generate mistralai/Mistral-7B-v0.1 --schedule" in outcome.stdout
    assert "--force" in was("published", "export", "teal-mistral-7b-50", "--out", out).error
    assert was("published", "export", "teal-mistral-7b-50", "--out", out, "--force", "--json").json["path"] == str(out)


def test_export_is_named_after_the_schedule(was, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert was("published", "export", "teal-mistral-7b-50").code == 0
    assert (tmp_path / "teal-mistral-7b-50.safetensors").is_file()


@pytest.mark.parametrize("command", ["show", "export"])
def test_an_unknown_name_gets_a_suggestion(was, command):
    outcome = was("published", command, "was-lama-2-7b-60")
    assert outcome.code == 1
    assert "did you mean was-llama-2-7b-60?" in outcome.error


@pytest.mark.parametrize("command", ["list", "show", "export"])
def test_every_command_has_examples(was, command):
    outcome = was("published", command, "--help")
    assert outcome.code == 0
    assert "Examples" in outcome.stdout

"""`--weights`: commands that quantise the model that they load."""

import dataclasses

import pytest

from was_fx import Calibration, Schedule
from was_fx.modules.quantized_linear import weight_formats

INT8 = ("--weights", "int8")


@pytest.fixture
def made(was, other_model, text, tmp_path):
    """A schedule of the other model with weights of int8, by `was calibrate` and `was make`."""
    calibration, schedule = tmp_path / "c.safetensors", tmp_path / "s.was.safetensors"
    outcome = was("calibrate", other_model, "--text", text, *INT8, "--out", calibration)
    assert outcome.code == 0, outcome.stderr
    assert "Weights: int8 (15 Linears)" in outcome.stdout
    assert was("make", calibration, "--target", "0.5", "--out", schedule).code == 0
    return calibration, schedule


def test_files_say_which_weights_they_were_made_with(was, made):
    calibration, schedule = made
    assert Calibration.load(calibration).weights == Schedule.load(schedule).metadata.weights
    assert Schedule.load(schedule).metadata.weights["lm_head"] == "int8"
    for path in made:
        assert "weights  int8 (15 Linears)" in was("inspect", path).stdout
    assert was("inspect", calibration, "--json").json["weights"]["lm_head"] == "int8"
    assert was("inspect", schedule, "--json").json["metadata"]["weights"]["lm_head"] == "int8"


def test_ppl_measures_the_quantised_model(was, other_model, text, made):
    arguments = ("ppl", other_model, "--text", text, "--length", 64, "--schedule", made[1], *INT8)
    outcome = was(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["weights"] == "int8 (15 Linears)"
    assert "Warning" not in outcome.stderr
    dense = was("ppl", other_model, "--text", text, "--length", 64, "--json").json
    assert dense["weights"] is None
    found, expected = (each["results"][0]["perplexity"] for each in (outcome.json, dense))
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-3)
    assert "int8 (15 Linears)," in was(*arguments).stdout


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_schedule_of_other_weights_is_warned_of(was, other_model, text, made):
    outcome = was("ppl", other_model, "--text", text, "--length", 64, "--schedule", made[1])
    assert outcome.code == 0, outcome.stderr
    assert (
        "Warning: the schedule was made with weights int8 (15 Linears), and those of the model are not"
        in outcome.stderr
    )


def test_every_command_that_runs_a_model_takes_it(was, other_model, text, made, tmp_path):
    out = tmp_path / "o.safetensors"
    common = (other_model, *INT8)
    search = was("search", *common, "--text", text, "--target", "0.5", "--recipe", "uniform", "--out", out, "--json")
    assert search.code == 0, search.stderr
    assert Schedule.load(out).metadata.weights == Schedule.load(made[1]).metadata.weights
    again = was("recalibrate", *common[:1], made[1], *INT8, "--text", text, "--rounds", 1, "--out", out, "--force")
    assert again.code == 0, again.stderr
    assert Schedule.load(out).metadata.weights["lm_head"] == "int8"
    check = was("check", *common, "--schedule", made[1], "--json")
    assert check.code == 0, check.stderr
    by = {row["implementation"] for row in check.json["linears"]}
    assert by <= {"cpu_quantized", "dequantised_product"}
    text_of = was("generate", *common, "--schedule", made[1], "--prompt", "It was", "--max-new-tokens", 4, "--json")
    assert text_of.code == 0, text_of.stderr


def test_bench_leaves_the_dense_model_plain(was, other_model, monkeypatch):
    """The timing itself has tests of its own, and compiles."""
    from was_fx.measure import speed

    asked = {}

    def pretended(model, targets, **arguments):
        asked.update(arguments, targets=targets, formats=weight_formats(model))
        row = speed.SpeedRow(0.0, 0.0, 2.0, (2.0,), 1.0, 100, prompt_tokens=8, prompt_ms=1.0, first_generate_s=1.0)
        return [row, dataclasses.replace(row, ratio=2.0)]

    monkeypatch.setattr(speed, "decode_speed", pretended)
    outcome = was("bench", other_model, *INT8, "--weights", "*.up_proj=int4", "--target", "0%")
    assert outcome.code == 0, outcome.stderr
    assert asked["weights"] == {"*": "int8", "*.up_proj": "int4"}
    assert (asked["targets"], asked["formats"]) == ([0.0], {})
    assert [line.split()[0] for line in outcome.stdout.splitlines() if "×" in line] == ["dense", "0.0"]
    assert "weights int8 *.up_proj=int4" in outcome.stdout


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("ppl", ["--weights", "int3", "--text", "{text}"], "the format of weights is 'int3'"),
        ("calibrate", ["--weights", "x=int5", "--text", "{text}"], "'int5'; expected one of int8"),
        ("check", ["--weights", "int8"], "give the schedule too"),
        ("search", ["--weights", "int8", "--target", "0.5", "--workers", "2"], "write a quantised one first"),
        ("bench", ["--weights", "int8", "--weights", "int8"], "given twice"),
    ],
)
def test_refusals(was, other_model, text, command, arguments, message):
    outcome = was(command, other_model, *[each.replace("{text}", str(text)) for each in arguments])
    assert outcome.code == 2, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""

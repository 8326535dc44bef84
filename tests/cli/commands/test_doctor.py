"""`was doctor`."""

import io
from dataclasses import replace

import pytest

from was_fx.cli.render import doctor_screens as screens
from was_fx.cli.render.console import PlainConsole
from was_fx.doctor import installation


@pytest.fixture(scope="module")
def outcome(was):
    return was("doctor")


def test_it_says_what_was_looked_at(outcome):
    assert outcome.code == 0, outcome.stderr
    for each in ("torch", "C++ kernels", "GPUs", "Inductor", "registered", "cpu_gather", "passed", "All is well"):
        assert each in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_json_with_a_model_names_kernels_and_levels(was, schedule):
    outcome = was("doctor", "embedded", "--schedule", schedule, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["ok"]
    assert outcome.json["problems"] == []
    uses = {use["name"]: use for use in outcome.json["kernels"]}
    assert len(uses["q_proj"]["linears"]) == 6
    assert uses["q_proj"]["implementation"] == "cpu_gather"
    assert uses["q_proj"]["nominal"] == [pytest.approx(0.5)] * 2
    assert not uses["lm_head"]["sparse"]


def test_a_quantised_checkpoint_is_seen_as_what_it_is(was, tmp_path):
    assert was("quantize", "embedded", "--weights", "int8", "--out", tmp_path / "int8").code == 0
    outcome = was("doctor", tmp_path / "int8", "--json")
    assert {use["weights"] for use in outcome.json["kernels"]} == {"int8"}
    assert {use["implementation"] for use in outcome.json["kernels"]} == {"cpu_quantized"}


def test_something_broken_is_a_sentence_and_exit_code_1(was, monkeypatch):
    monkeypatch.setattr(installation.metadata, "version", lambda name: "0.1")
    outcome = was("doctor")
    assert outcome.code == 1
    assert "Problem: torch 0.1 is outside of" in " ".join(outcome.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--weights", "int8"], 2, "give the model too"),
        (["--schedule", "none"], 2, "give the model too"),
        (["nowhere"], 1, "no model directory 'nowhere'"),
        (["embedded", "--schedule", "none"], 1, "there is no was-fx schedule here"),
        (["embedded", "--weights", "int5"], 2, "expected one of int8"),
    ],
)
def test_refusals(was, arguments, code, message):
    outcome = was("doctor", *arguments)
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())


def test_gpus_and_failures_are_drawn():
    from was_fx.doctor.diagnosis import Diagnosis
    from was_fx.doctor.hardware import Gpu, Processor
    from was_fx.doctor.self_test import SelfTest

    gpu = Gpu(0, "NVIDIA [bold]H100[/]", 80 << 30, 40 << 30, (9, 0), 132, 9, True, False, "triton is not installed")
    other = replace(gpu, index=1, name="NVIDIA L40S", multiprocessors=142, measured=0, ahead=False)
    failed = SelfTest("bf16", "bf16", 1, (512, 512), "gpu_gather", None, 1e-2, None, "no kernel image")
    cpu = Processor("some CPU", (), 4, 4, "", "", "no compiler")
    console = PlainConsole(io.StringIO(), width=80)
    screens.show(console, Diagnosis("cuda:0", (), cpu, (gpu, other), (), (), (failed,)))
    screens.verdict(console, ["triton is not installed"])
    drawn = console.file.getvalue()
    for each in ("NVIDIA [bold]H100[/]", "40.0 of 80.0 GiB free", "no Triton", "FAILED", "Problem: triton is not"):
        assert each in " ".join(drawn.split())
    told = [" ".join(line.split()) for line in drawn.splitlines()]
    assert any(line.startswith("measured tile sizes of 9 products") for line in told)
    assert any(line.startswith("not measured tile sizes by a rule for 142") for line in told)

"""`was make`."""

import pytest

from was_fx import Schedule


@pytest.mark.parametrize("target", ["0.5", "50%", "50 %"])
def test_writes_a_uniform_schedule(was, tmp_path, calibration, target):
    out = tmp_path / "s.was.safetensors"
    outcome = was("make", calibration, "--target", target, "--out", out)
    assert outcome.code == 0
    assert Schedule.load(out).sparsity == 0.5
    assert "was inspect" in outcome.stdout


def test_fisher_weights_make_linears_differ(was, tmp_path):
    file, out = tmp_path / "fisher.safetensors", tmp_path / "s.was.safetensors"
    outcome = was("calibrate", "embedded", "--tokens", "512", "--length", "128", "--fisher", "--out", file)
    assert "--target 50% --fisher" in outcome.stdout
    assert was("make", file, "--target", "50%", "--fisher", "--out", out).code == 0
    made = Schedule.load(out)
    assert made.metadata.recipe == "fisher"
    assert made.sparsity == pytest.approx(0.5, abs=1e-6)
    assert len({entry.sparsity for entry in made.linears.values()}) > 20


def test_fisher_weights_must_be_there(was, tmp_path, calibration):
    outcome = was("make", calibration, "--target", "50%", "--fisher", "--out", tmp_path / "s.was.safetensors")
    assert outcome.code == 1
    assert "was calibrate --fisher" in outcome.error


def test_json_says_what_was_made(was, tmp_path, calibration):
    out = tmp_path / "s.was.safetensors"
    outcome = was("make", calibration, "--target", "0.25", "--out", out, "--json")
    assert outcome.json == {"path": str(out), "target": 0.25, "nominal": 0.25, "linears": 42}


def test_an_existing_file_is_replaced_with_force_only(was, tmp_path, calibration):
    out = tmp_path / "s.was.safetensors"
    out.write_bytes(b"mine")
    assert "--force" in was("make", calibration, "--target", "0.5", "--out", out).error
    assert out.read_bytes() == b"mine"
    assert was("make", calibration, "--target", "0.5", "--out", out, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{calibration}", "--target", "1.5"], 2, "did you mean 1.5%"),
        (["{calibration}", "--target", "-0.1"], 2, "outside"),
        (["{calibration}", "--target", "100%"], 2, "outside"),
        (["{calibration}", "--target", "nan"], 2, "outside"),
        (["{calibration}", "--target", "abc"], 2, "not a number"),
        (["{calibration}"], 2, "--target"),
        (["{calibration}", "--target", "0.5", "--latency", "{tmp}/text"], 2, "--latency is for --fisher"),
        (["{calibration}", "--target", "0.5", "--fisher", "--latency", "{tmp}/text"], 1, "not a latency table"),
        (["{calibration}", "--target", "0.9999"], 1, "0.999"),
        (["{tmp}/none", "--target", "0.5"], 1, "there is no was-fx calibration here"),
        (["{tmp}/text", "--target", "0.5"], 1, "not a safetensors file"),
        (["{schedule}", "--target", "0.5"], 1, "is a schedule already"),
        (["{calibration}", "--target", "0.5", "--out", "{tmp}/text/s.safetensors"], 1, "cannot be written"),
    ],
)
def test_refusals(was, tmp_path, calibration, schedule, arguments, code, message):
    (tmp_path / "text").write_text("no tensors", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    names = {"{tmp}": tmp_path, "{calibration}": calibration, "{schedule}": schedule}
    for name, path in names.items():
        arguments = [each.replace(name, str(path)) for each in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "s.safetensors")]
    outcome = was("make", *arguments)
    assert outcome.code == code, outcome
    text = outcome.error if code == 1 else outcome.stderr
    assert message in " ".join(text.replace("│", " ").split())
    assert sorted(tmp_path.iterdir()) == before

"""`was recalibrate`."""

import pytest

from was_fx import Schedule


def test_writes_the_same_sparsities_with_new_thresholds(was, tmp_path, schedule):
    out = tmp_path / "new.was.safetensors"
    outcome = was("recalibrate", "embedded", schedule, "--out", out, "--tokens", 2048, "--rounds", 1)
    assert outcome.code == 0
    before, after = Schedule.load(schedule), Schedule.load(out)
    assert {n: e.sparsity for n, e in after.linears.items()} == {n: e.sparsity for n, e in before.linears.items()}
    last = list(before.linears)[-1]
    assert after.linears[last].threshold != before.linears[last].threshold
    assert "was ppl" in outcome.stdout


def test_json_says_what_was_made(was, tmp_path, schedule):
    out = tmp_path / "new.was.safetensors"
    arguments = ("--tokens", 1024, "--rounds", 1, "--json")
    made = was("recalibrate", "embedded", schedule, "--out", out, *arguments).json
    assert made == {"path": str(out), "nominal": Schedule.load(schedule).sparsity, "tokens": 1024, "rounds": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "{calibration}", "--out", "{out}"], 1, "is a calibration"),
        (["embedded", "missing.safetensors", "--out", "{out}"], 1, "missing.safetensors"),
        (["embedded", "{schedule}", "--out", "{out}", "--text", "embedded:tset"], 1, "tset"),
        (["embedded", "{schedule}"], 2, "--out"),
        (["embedded", "{schedule}", "--out", "{out}", "--rounds", "0"], 2, "--rounds"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(was, tmp_path, calibration, schedule, arguments, code, message):
    out = tmp_path / "new.was.safetensors"
    outcome = was(
        "recalibrate", *[each.format(calibration=calibration, schedule=schedule, out=out) for each in arguments]
    )
    assert outcome.code == code
    assert message in outcome.stderr
    assert not out.exists()

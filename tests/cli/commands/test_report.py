"""`was report`: measures, keeps what it has measured, and writes a page."""

import json
import re

import pytest

from tests.cli.page.made_up import Page

QUICK = ("--limit", 1, "--length", 64, "--no-speed", "--lowering", "eager", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def made(was, schedule, tmp_path_factory):
    """A report of the embedded model, with its JSON."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    outcome = was("report", "embedded", "--schedule", schedule, "--weights", "int8", *QUICK, "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    return out, outcome.json


def test_the_page_has_what_was_measured(was, made, schedule):
    out, found = made
    page = Page(out.read_text(encoding="utf-8"))
    assert page.sections == ["choices", "schedules", "samples", "environment"]
    assert page.texts["h1"] == [found["headline"]]
    assert [(each["format"], each["schedule"]) for each in found["choices"]] == [
        (format, name) for format in ("fp32", "int8") for name in (None, "s50")
    ]
    for each in found["choices"]:
        assert f"{each['loss']:.4f}" in page.texts["td"]
    ppl = was("ppl", "embedded", "--schedule", schedule, "--limit", 1, "--length", 64, "--json").json["results"]
    assert [each["loss"] for each in found["choices"][:2]] == [each["loss"] for each in ppl]
    assert found["choice"]["format"] == "int8", "nearly free, and it reads less"


def test_the_same_command_measures_nothing_again(was, made, schedule):
    out, found = made
    kept = out.with_suffix(".jsonl")
    lines = kept.read_text().splitlines()
    again = was("report", "embedded", "--schedule", schedule, "--weights", "int8", *QUICK, "--out", out, "--force")
    assert again.code == 0, again.stderr
    assert again.stderr == ""
    assert again.stdout.splitlines()[-1] == f"Wrote {out}" or again.stdout.endswith(f"{out.name}\n")
    assert kept.read_text().splitlines() == lines
    # As after a kill: the last measurement is gone, and half a line is left.
    kept.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    out.unlink()
    rest = was("report", "embedded", "--schedule", schedule, "--weights", "int8", *QUICK, "--out", out, "--json")
    assert [line for line in rest.stderr.splitlines() if "Scoring" in line] == ["Scoring int8, s50 …"]
    assert rest.json["choices"] == found["choices"]


def test_every_section_that_is_given(was, schedule, calibration, tmp_path):
    history = tmp_path / "search.jsonl"
    history.write_text("".join(json.dumps({"index": at, "loss": 4.0 - at}) + "\n" for at in range(3)))
    tasks = {"piqa": {"acc,none": 0.75, "acc_stderr,none": 0.01, "alias": "piqa"}}
    rows = [{"schedule": name, "tasks": tasks} for name in (None, str(schedule))]
    results = tmp_path / "eval.json"
    results.write_text(json.dumps({"model": "embedded", "prefill": "sparse", "limit": 5, "results": rows}))
    out = tmp_path / "page.html"
    given = ("--history", history, "--eval", results, "--calibration", calibration, "--prompt", "It was")
    outcome = was(
        *("report", "embedded", "--schedule", schedule, "--limit", 1, "--length", 64, "--lowering", "eager"),
        *("--repetitions", 1, "--max-new-tokens", 4, *given, "--out", out, "--json"),
    )
    assert outcome.code == 0, outcome.stderr
    page = Page(out.read_text(encoding="utf-8"))
    assert page.sections == ["choices", "schedules", "scores", "tasks", "samples", "search", "environment"]
    assert page.texts["blockquote"] == ["It was"]
    assert all(each["ratio"] > 0 for each in outcome.json["choices"])
    assert "0.750 ± 0.010 (+0.0)" in page.texts["td"]
    assert any(re.fullmatch(r"\d+\.\d\d×", cell) for cell in page.texts["td"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--schedule", "{schedule}", "--schedule", "{schedule}"], 2, "is given twice"),
        (["--schedule", "{schedule}", "--weights", "int8", "--weights", "int8"], 2, "int8 is given twice"),
        (["--schedule", "{schedule}", "--weights", "int9"], 2, "int9"),
        (["--schedule", "{schedule}", "--within", "5"], 2, "did you mean 5%?"),
        (["--schedule", "{calibration}"], 1, "is a calibration, not a schedule"),
        (["--schedule", "{schedule}", "--calibration", "{schedule}"], 1, "is a schedule already"),
        (["--schedule", "{schedule}", "--eval", "{other}"], 1, "is not what was eval --json prints"),
        (["--schedule", "{schedule}", "--history", "{other}"], 1, "holds no trial with a loss"),
        (["--schedule", "{schedule}", "--out", "{other}"], 1, "exists already"),
        (["--schedule", "{schedule}", "--prompt", "word " * 3000], 1, "fewer new tokens"),
        ([], 2, "Missing option '--schedule'"),
    ],
)
def test_what_is_refused(was, schedule, calibration, tmp_path, arguments, code, message):
    other = tmp_path / "other.json"
    other.write_text("{}")
    names = {"schedule": schedule, "calibration": calibration, "other": other}
    out = [] if "--out" in arguments else ["--out", tmp_path / "page.html"]
    outcome = was("report", "embedded", *(each.format(**names) for each in arguments), *QUICK, *out)
    assert outcome.code == code
    assert message in re.sub(r"[\s│]+", " ", outcome.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]

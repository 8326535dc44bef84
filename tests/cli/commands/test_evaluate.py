"""`was eval`."""

import json
import sys

import pytest

from was_fx.plugins.lm_eval import PAIRS

FAST = ("--limit", 6, "--batch-size", 8)


def test_table_has_a_row_per_schedule(was, schedule):
    outcome = was("eval", "embedded", "--schedule", schedule, *FAST)
    assert outcome.code == 0, outcome.stderr
    lines = " ".join(outcome.stdout.split())
    assert "minimal_pairs acc" in lines
    assert "dense" in lines
    assert "50.0 %" in lines
    assert "±" in lines


def test_json_and_a_log_that_is_continued(was, schedule, tmp_path):
    pairs = tmp_path / "mine.jsonl"
    pairs.write_text("\n".join(PAIRS.read_text().splitlines()[:6]) + "\n")
    log = tmp_path / "eval.jsonl"
    arguments = ("eval", "embedded", "--pairs", pairs, "--log", log, "--json", *FAST)
    dense = was(*arguments)
    assert dense.code == 0, dense.stderr
    assert len(log.read_text().splitlines()) == 1
    both = was(*arguments, "--schedule", schedule)
    assert "Evaluating dense" not in both.stderr
    assert f"Evaluating {schedule}" in " ".join(both.stderr.split())
    assert len(log.read_text().splitlines()) == 2
    first, second = both.json["results"]
    assert first == dense.json["results"][0]
    assert second["schedule"] == str(schedule)
    assert second["nominal"] == pytest.approx(0.5)
    assert 0.3 < second["realised"] < 0.7
    assert 0 <= second["tasks"]["mine"]["acc,none"] <= 1
    again = was(*arguments, "--schedule", schedule)
    assert "Evaluating" not in again.stderr
    assert again.json == both.json


def test_lm_eval_that_is_missing_is_named_with_its_command(was, monkeypatch):
    monkeypatch.delitem(sys.modules, "was_fx.plugins.lm_eval", raising=False)
    monkeypatch.delattr(sys.modules["was_fx.plugins"], "lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    outcome = was("eval", "embedded")
    assert outcome.code == 1
    assert 'pip install "was-fx[eval]"' in " ".join(outcome.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embedded", "--pairs", "nowhere.jsonl"], 1, "no such file of sentence pairs"),
        (["embedded", "--schedule", "none"], 1, "there is no was-fx schedule here"),
        (["embedded", "--limit", "0"], 2, "--limit"),
    ],
)
def test_refusals(was, arguments, code, message):
    outcome = was("eval", *arguments)
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""


def test_a_file_that_is_no_log_is_refused(was, tmp_path):
    (tmp_path / "log").write_text(json.dumps({"other": 1}) + "\n")
    outcome = was("eval", "embedded", "--log", tmp_path / "log")
    assert outcome.code == 1
    assert "line 1, is no result of `was eval`" in " ".join(outcome.stderr.split())

"""`was eval`."""

import json
import sys

import pytest

from was_fx.plugins.lm_eval import PAIRS

FAST = ("--limit", 6, "--batch-size", 8)


def test_table_has_a_row_per_schedule(was, schedule):
    outcome = was("eval", "embedded", "--schedule", schedule, *FAST)
    assert outcome.code == 0, outcome.stderr
    assert "Tokenizing inputs" not in outcome.stderr  # lm-eval's bars
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
    assert "Evaluating s50 on mine" in " ".join(both.stderr.split())
    assert len(log.read_text().splitlines()) == 2
    first, second = both.json["results"]
    assert first == dense.json["results"][0]
    change = second["changes"]["mine"]["acc,none"]
    assert change["change"] == pytest.approx(second["tasks"]["mine"]["acc,none"] - first["tasks"]["mine"]["acc,none"])
    assert change["paired"]
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
        (["embedded", "--weights", "int5"], 2, "int5"),
        (["embedded", "--task", "arc_easi,piqa"], 1, "no task 'arc_easi' (did you mean arc_easy?)"),
        (["embedded", "--chat-template", "--limit", "2"], 1, "the tokenizer has no chat template"),
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
    assert "line 1, is no result" in " ".join(outcome.stderr.split())


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks of lm-eval's kind, whose documents lie beside them."""
    for name, answers in {"colour": ["green", "blue"], "number": ["one", "two"]}.items():
        data = tmp_path / f"{name}.jsonl"
        rows = [{"question": f"a {name} {i}", "answer": i % 2} for i in range(8)]
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        (tmp_path / f"{name}.yaml").write_text(
            f"task: my_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\nfewshot_split: test\noutput_type: multiple_choice\n"
            f"doc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: {answers}\n"
        )
    return tmp_path


def test_tasks_schedules_and_formats_in_one_run(was, schedule, tasks):
    log = tasks / "log.jsonl"
    arguments = ("eval", "embedded", "--include-path", tasks, "--schedule", schedule, "--weights", "int8", *FAST)
    arguments += ("--task", "my_colour,my_number", "--fewshot", 2, "--log", log)
    outcome = was(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    rows = outcome.json["results"]
    assert [(row["weights"], row["schedule"] is not None) for row in rows] == [
        (None, False), (None, True), ("int8", False), ("int8", True)
    ]  # fmt: skip
    assert all(set(row["tasks"]) == {"my_colour", "my_number"} for row in rows)
    assert len(log.read_text().splitlines()) == 8
    shown = was(*arguments)
    assert "Evaluating" not in shown.stderr
    text = " ".join(shown.stdout.split())
    assert "int8, dense" in text
    assert "int8, s50" in text
    assert "realised" in text


def test_what_a_kill_left_is_measured_only(was, schedule, tasks):
    log = tasks / "log.jsonl"
    arguments = ("eval", "embedded", "--include-path", tasks, "--task", "my_colour", "--tasks", "my_number", *FAST)
    whole = was(*arguments, "--log", log, "--json")
    assert whole.code == 0, whole.stderr
    first, second = log.read_text().splitlines(keepends=True)
    log.write_text(first + second[:40])
    again = was(*arguments, "--log", log, "--json")
    assert again.json == whole.json
    assert "on my_colour" not in again.stderr
    assert "on my_number" in again.stderr
    assert log.read_text() == first + second


def test_examples_in_the_prompt_change_what_is_scored(was, tasks):
    arguments = ("eval", "embedded", "--include-path", tasks, "--task", "my_number", "--json")
    none, two = (was(*arguments, "--fewshot", n) for n in (0, 2))
    assert (none.json["fewshot"], two.json["fewshot"]) == (0, 2)
    assert none.code == two.code == 0

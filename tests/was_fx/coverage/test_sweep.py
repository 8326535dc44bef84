"""A sweep goes on after crashes and timeouts, and resumes from its record."""

import json
import os
import time

from was_fx.coverage import sweep as coverage_sweep
from was_fx.coverage.cover import Coverage
from was_fx.coverage.sweep import sweep, versions


def pretend(model_type: str, *, graphs: bool = True) -> Coverage:
    if model_type == "crash":
        os._exit(3)
    if model_type == "hang":
        time.sleep(60)
    return Coverage(model_type, "Class", linears=3, graph_breaks=("one",), declined={"a": "b"})


def test_results_are_recorded_and_given_back_without_another_try(tmp_path, monkeypatch):
    record = tmp_path / "coverage.jsonl"
    tried = []
    monkeypatch.setattr(coverage_sweep, "_isolated", lambda name, timeout, graphs: tried.append(name) or pretend(name))
    first = list(sweep(["a", "b"], record=record))
    assert tried == ["a", "b"]
    with record.open("a") as file:
        file.write('{"versions": {"tor')  # a kill in the middle of a line
    steps = []
    assert list(sweep(["a", "b"], record=record, progress=lambda *step: steps.append(step))) == first
    assert tried == ["a", "b"]
    assert steps == [(0, 2), (1, 2), (2, 2)]
    list(sweep(["c"], record=record))
    assert list(sweep(["c"], record=record)) == [pretend("c")]
    assert tried == ["a", "b", "c"]


def test_a_record_of_other_versions_is_not_used(tmp_path, monkeypatch):
    record = tmp_path / "coverage.jsonl"
    tried = []
    monkeypatch.setattr(coverage_sweep, "_isolated", lambda name, timeout, graphs: tried.append(name) or pretend(name))
    list(sweep(["a"], record=record))
    entry = json.loads(record.read_text())
    assert entry["versions"] == versions()
    record.write_text(json.dumps({**entry, "versions": {**versions(), "torch": "0.1"}}) + "\n")
    list(sweep(["a"], record=record))
    assert tried == ["a", "a"]


def test_a_type_that_crashes_or_hangs_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(coverage_sweep, "METHOD", "fork")  # the processes inherit the stand-in
    monkeypatch.setattr(coverage_sweep, "cover", pretend)
    found = list(sweep(["crash", "hang", "a"], timeout=2.0))
    assert found[0].error == "its process ended with exit code 3"
    assert found[1].error == "not done after 2 s"
    assert found[2] == pretend("a")

"""`was search`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from was_fx import Schedule, embedded
from was_fx.cli.render.search_progress import progress_line, sparkline
from was_fx.schedules.search.block_search import SearchState

SMALL = ("--tokens", 128, "--length", 64)


def arguments(model, out, *more):
    """A search over the blocks of a model of random weights, in seconds."""
    text = out.parent / "prose.txt"
    if not text.exists():
        text.write_text(embedded.text("validation")[:4000], encoding="utf-8")
    return ["search", model, "--target", "50%", "--out", out, "--text", text, *SMALL, *more]


def test_writes_a_schedule_that_meets_the_target(was, other_model, tmp_path):
    out = tmp_path / "s.was.safetensors"
    outcome = was(*arguments(other_model, out))
    assert outcome.code == 0, outcome.stderr
    assert abs(Schedule.load(out).sparsity - 0.5) <= 1e-6
    assert "was ppl" in outcome.stdout
    assert "sensitivities" in outcome.stderr


def test_fisher_corrects_its_weights_as_often_as_asked(was, other_model, tmp_path):
    spent = {}
    for name, more in {"none": ("--corrections", 0), "once": (), "twice": ("--corrections", 2)}.items():
        out = tmp_path / f"{name}.was.safetensors"
        outcome = was(*arguments(other_model, out, "--recipe", "fisher", *more))
        assert outcome.code == 0, outcome.stderr
        assert ("costs of what is dropped" in outcome.stderr) is (name != "none")
        spent[name] = Schedule.load(out).metadata.history["tokens"].get("costs", 0)
    assert spent["none"] == 0 < spent["once"] < spent["twice"]


def test_json_and_log_tell_the_same(was, other_model, tmp_path):
    out, log = tmp_path / "s.was.safetensors", tmp_path / "log.jsonl"
    more = ("--recipe", "wisparse", "--trials", 3, "--log", log, "--json")
    made = was(*arguments(other_model, out, *more)).json
    records = [json.loads(line) for line in log.read_text().splitlines()]
    trials = [record for record in records if record.get("trial", "").startswith("trial")]
    assert len(trials) == len(made["history"]["best"]) == 3
    assert made["loss"] == pytest.approx(min(sum(each["losses"]) / len(each["losses"]) for each in trials), abs=1e-5)


def command(model, out, log, *more):
    words = arguments(model, out, "--log", log, *more)
    return [sys.executable, "-m", "was_fx.cli.main", *map(str, words)]


@pytest.mark.slow
def test_a_killed_search_resumes_to_the_same_schedule(other_model, tmp_path):
    whole, killed, log = tmp_path / "whole.st", tmp_path / "killed.st", tmp_path / "log.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(other_model, killed, log), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") > 10:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()
    done = log.read_bytes().count(b"\n")
    for out, record, more in ((killed, log, ["--resume"]), (whole, tmp_path / "other.jsonl", [])):
        subprocess.run(command(other_model, out, record, *more), env=environment, check=True, capture_output=True)
    assert 10 < done < log.read_bytes().count(b"\n")
    assert Schedule.load(killed) == Schedule.load(whole)


def test_two_processes_find_what_one_finds_with_the_same_batch(was, other_model, tmp_path):
    one, two = tmp_path / "one.st", tmp_path / "two.st"
    assert was(*arguments(other_model, one)).code == 0
    outcome = was(*arguments(other_model, two, "--workers", 2))
    assert outcome.code == 0, outcome.stderr
    first, second = Schedule.load(one), Schedule.load(two)
    assert [e.sparsity for e in first.linears.values()] == pytest.approx(
        [e.sparsity for e in second.linears.values()], abs=1e-3
    )


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_of_two_workers_runs_the_trials(was, other_model, tmp_path):
    from distributed import LocalCluster

    out, log = tmp_path / "s.was.safetensors", tmp_path / "log.jsonl"
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(processes=True, **settings) as cluster:
        more = ("--dask", cluster.scheduler_address, "--workers", 2, "--log", log)
        outcome = was(*arguments(other_model, out, *more))
        assert outcome.code == 0, outcome.stderr
        assert abs(Schedule.load(out).sparsity - 0.5) <= 1e-6
        assert log.read_text().count("divergence") > 40


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--target", "1.5"], 2, "outside 0 ≤ target < 1"),
        (["--target", "0"], 1, "above 0 and below 1"),
        (["--target", "97%"], 1, "the bounds allow"),
        (["--resume"], 2, "--log"),
        (["--cost", "latency"], 2, "--latency"),
        (["--recipe", "exact", "--corrections", "2"], 2, "only the recipe fisher has corrections"),
        (["--length", "128", "--tokens", "64"], 1, "less than one window"),
        (["--recipe", "exact", "--paper-exact"], 1, "no released code"),
        (["--text", "missing.txt"], 1, "missing.txt"),
        (["--log", "{text}", "--resume"], 1, "not a search log"),
        (["--log", "{text}"], 1, "a search log is here already"),
        (["--cost", "latency", "--latency", "{text}"], 1, "not a latency table"),
        (["--start", "{text}"], 1, "not a safetensors file"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(was, other_model, tmp_path, text, more, code, message):
    out = tmp_path / "s.was.safetensors"
    before = text.read_bytes()
    outcome = was(*arguments(other_model, out, *[each.format(text=text) for each in more]))
    assert outcome.code == code
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert not out.exists()
    assert text.read_bytes() == before


def test_a_text_shorter_than_a_window_is_refused(was, other_model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    outcome = was(*arguments(other_model, tmp_path / "s.st", "--text", short))
    assert outcome.code == 1
    assert "too few for one window of 64" in outcome.error


def test_progress_tells_best_shape_time_left_and_whose_time_it_was():
    state = SearchState(4, 50, 3.5, (0.4, 0.5, 0.6), 12.0, 30.0, 125.0)
    assert (
        progress_line(state)
        == "trial 4/50, best 3.5000, blocks ▁▅█ 40–60 %, 2:05 min left (trials 30 s, optimiser 12 s)"
    )
    assert progress_line(SearchState(1, 4, phase="sensitivities of 42 Linears")) == "sensitivities of 42 Linears 2/4"


def test_equal_levels_have_a_flat_line():
    assert sparkline((0.5, 0.5, 0.5)) == "▄▄▄"

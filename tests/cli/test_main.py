"""The command as a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from was_fx.cli.render import console

COMMAND = [sys.executable, "-m", "was_fx.cli.main"]
COMMANDS = [
    *("calibrate", "make", "search", "recommend", "recalibrate", "inspect", "compare", "import", "ppl", "eval"),
    *("generate", "chat", "bench", "tune", "demo", "report"),
]


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", **more}


def test_help_is_quick_and_names_every_command():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, env=_environment(), check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 5  # 0.3 on a quiet machine; other tests run beside it
    for name in (
        "calibrate",
        "make",
        "search",
        "recommend",
        "inspect",
        "compare",
        "import",
        "ppl",
        "eval",
        "generate",
        "bench",
        "tune",
        "demo",
    ):
        assert f"│ {name} " in done.stdout
    assert "\x1b" not in done.stdout


USAGE_ERRORS = [
    [],
    ["calibrat"],
    ["--wrong"],
    ["ppl"],
    ["ppl", "embedded", "--wrong"],
    ["ppl", "embedded", "--limit", "none"],
    ["ppl", "./nowhere"],
    ["ppl", "embedded", "--device", "cpu", "--device-map", "auto"],
    ["calibrate", "embedded", "--score", "was", "--exponent", "1"],
    ["make", "none", "--target", "50"],
    ["search", "embedded", "--target", "0.5", "--resume"],
    ["search", "embedded", "--target", "0.5", "--recipe", "fsher"],
    ["search", "embedded", "--target", "0.5", "--cost", "latency"],
    ["check", "embedded", "--weights", "int8"],
    ["import", "folder", "--model", "embedded", "--out", "x"],
    ["compare"],
    ["compare", "was-llama-2-7b-60", "--plot", "x.gif"],
    ["published", "shw"],
]
QUICK = """
import json, sys
from was_fx.cli.main import app
heavy = {}
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments, prog_name="was")
    except SystemExit as stop:
        found = {"torch", "transformers", "triton", "matplotlib", "nevergrad"} & set(sys.modules)
        heavy[" ".join(arguments)] = [stop.code, sorted(found)]
print(json.dumps(heavy), file=sys.__stdout__)
"""


def test_help_and_usage_errors_import_nothing_heavy():
    every = [["--help"], ["ppl", "--help"], ["--version"], *USAGE_ERRORS]
    done = subprocess.run(
        [sys.executable, "-c", QUICK, json.dumps(every)], capture_output=True, text=True, check=True, env=_environment()
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {arguments: modules for arguments, (_, modules) in found.items() if modules} == {}
    assert {arguments: code for arguments, (code, _) in found.items() if code not in (0, 1, 2)} == {}
    assert found["ppl embedded --wrong"][0] == 2


def test_a_usage_error_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "search", "embedded", "--recipe", "fsher"], capture_output=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 2
    assert min(times) < 5


def test_exit_codes_are_told(was):
    assert "0 done, 1 failed, 2 wrong usage, 130 interrupted" in " ".join(was("--help").stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell):
    script = subprocess.run(
        [*COMMAND, "--show-completion", shell],
        capture_output=True,
        text=True,
        env=_environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"),
    )
    assert script.returncode == 0, script.stderr
    assert "_WAS_COMPLETE" in script.stdout


def test_completion_knows_commands_and_options():
    asked = {"was re": "recalibrate", "was ppl embedded --sch": "--schedule", "was search x --recipe fi": "fisher"}
    for words, expected in asked.items():
        environment = _environment(_WAS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment)
        assert expected in done.stdout.split(), (words, done.stdout, done.stderr)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples(was, name):
    outcome = was(name, "--help")
    assert outcome.code == 0
    assert "Examples" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_version(was):
    from was_fx import __version__

    assert was("--version").stdout == f"was-fx {__version__}\n"


def test_a_mistyped_command_gets_a_suggestion(was):
    outcome = was("calibrat")
    assert outcome.code == 2
    assert "calibrate" in outcome.stderr


def test_a_failure_exits_with_one_and_keeps_stdout_empty(tmp_path):
    done = subprocess.run([*COMMAND, "inspect", tmp_path / "none"], capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupt_exits_with_130_and_writes_nothing(tmp_path):
    out = tmp_path / "c.safetensors"
    process = subprocess.Popen(
        [*COMMAND, "calibrate", "embedded", "--batch-size", "1", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
    )
    try:
        assert process.stderr is not None
        while "Calibrating" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    # CPython ends by the signal itself, which shells show as 130 too, if Ctrl-C hit a string given to exec().
    assert process.returncode in (130, -signal.SIGINT)
    assert stdout == ""
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_search_keeps_whole_lines_and_says_how_to_go_on(tmp_path, other_model, text):
    folder = tmp_path / "made"
    folder.mkdir()
    log = folder / "log.jsonl"
    options = ["--recipe", "was", "--target", "50%", "--trials", "5000", "--tokens", "64", "--length", "32"]
    arguments = [
        "search",
        str(other_model),
        "--text",
        str(text),
        *options,
        "--log",
        str(log),
        "--out",
        str(folder / "s.was.safetensors"),
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
    )
    try:
        end = time.monotonic() + 200
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    said = stderr[stderr.index("Interrupted.") :]
    assert f"The same command, with --resume goes on: what was done is in {log}" in said
    assert "Traceback" not in stderr
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    for line in log.read_text().splitlines():
        json.loads(line)
    # Calm: a line for each step, though nothing watches.
    assert "\r" not in stderr
    assert len(stderr.splitlines()) < 30


def test_an_interrupt_that_other_code_ignores_is_raised_by_the_next_progress(monkeypatch):
    monkeypatch.setattr(console, "_interrupted", threading.Event())
    with console.progress("Doing it") as advance:
        advance(1, 3)
        with contextlib.suppress(KeyboardInterrupt):
            console.interrupt()
        with pytest.raises(KeyboardInterrupt):
            advance(2, 3)

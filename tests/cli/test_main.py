"""The command as a process of its own."""

import contextlib
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
    *("generate", "bench", "tune", "demo", "report"),
]


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", **more}


def test_help_is_quick_and_names_every_command():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, env=_environment(), check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5
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


def test_help_imports_no_torch():
    code = "import sys, was_fx.cli.main; print({'torch', 'transformers', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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


def test_an_interrupt_that_other_code_ignores_is_raised_by_the_next_progress(monkeypatch):
    monkeypatch.setattr(console, "_interrupted", threading.Event())
    with console.progress("Doing it") as advance:
        advance(1, 3)
        with contextlib.suppress(KeyboardInterrupt):
            console.interrupt()
        with pytest.raises(KeyboardInterrupt):
            advance(2, 3)

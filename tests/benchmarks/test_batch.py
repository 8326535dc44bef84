"""`benchmarks/batch.py`, on a CPU with one small block."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch.py"
TINY = ["--device", "cpu", "--lowering", "eager", "--shape", "llama-3.2-1b", "--blocks", "1", "--vocabulary", "64"]


@pytest.mark.slow
def test_sequences_and_tokens_together_read_the_union():
    given = ["--batches", "1", "4", "--together", "2", "--targets", "0.5", "--steps", "9", "--repetitions", "1"]
    done = subprocess.run([sys.executable, SCRIPT, *TINY, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [(row["sequences"], row["together"], row["target"]) for row in rows]
    assert found == [(size, together, target) for size, together in ((1, 1), (4, 1), (1, 2)) for target in (0.0, 0.5)]
    reads = [row["read"] for row in rows]
    assert reads[::2] == [1.0] * 3
    assert reads[1] == pytest.approx(0.5, abs=0.05)
    assert reads[1] < reads[5] < reads[3] < 1
    assert all(row["step_ms"] > 0 and row["tokens_per_s"] > 0 for row in rows)
    assert "dense is faster" in done.stdout


def test_too_few_steps_are_refused():
    done = subprocess.run([sys.executable, SCRIPT, *TINY, "--steps", "8"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "more than 8 steps" in done.stderr

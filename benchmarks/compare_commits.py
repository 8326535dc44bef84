"""Decode speed of this checkout against another commit's, in turns on one machine.

    mkdir -p build/other && git archive COMMIT | tar -x -C build/other
    python benchmarks/compare_commits.py build/other
    python benchmarks/compare_commits.py build/other --device cpu --shapes tiny --rounds 3    # tries it out

For each shape two processes, each with the was_fx of its own folder, make the same model with random weights, sparsify
it, and time decode steps (static cache, the GPU's clock) and `generate()` whenever they are asked. The folders take
turns, in another order each round. Prints one JSON line per shape and target, and then a table of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from was_fx.measure.shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("commit_worker.py")
TINY = ("llama", {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512})  # fmt: skip
SIDES = ("other", "this")
MEASURES = {"step_ms": "ms/step", "token_ms": "generate() ms/token", "call_ms": "generate() call, ms"}


class Worker:
    """A process with the was_fx of one folder, its compiler's caches its own."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        environment = os.environ | {
            "PYTHONPATH": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process with {self.folder} ended with code {self._process.wait()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def compare(
    shape: str, folders: dict[str, Path], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what both processes said of themselves, a row per target) for one shape."""
    kind, settings = TINY if shape == "tiny" else SHAPES[shape]
    asked = {
        "kind": kind,
        "settings": settings,
        "device": arguments.device,
        "targets": arguments.targets,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        workers = {side: Worker(folder, Path(scratch) / side) for side, folder in folders.items()}
        try:
            say(f"{shape}: making the models")
            for worker in workers.values():
                worker.ask(asked)
            about = {side: worker.answer() for side, worker in workers.items()}
            check_same(about)
            for side, worker in workers.items():  # one at a time: the first generate() is timed
                say(f"{shape}: compiling, {side}")
                worker.ask({"do": "warm"})
                about[side] |= worker.answer()
            found = in_turns(workers, arguments.targets, arguments.rounds)
        finally:
            for worker in workers.values():
                worker.end()
    return about, [summary(shape, target, found[target]) for target in arguments.targets]


def check_same(about: dict[str, dict[str, Any]]) -> None:
    """Refuse processes that have not made the same model, or run the same code."""
    first, second = about.values()
    if first["weights"] != second["weights"] or first["thresholds"] != second["thresholds"]:
        raise SystemExit(f"the two processes made different models: {about}")
    if first["was_fx"] == second["was_fx"]:
        raise SystemExit(f"both processes imported {first['was_fx']}; the folders must hold a was_fx each")


def in_turns(
    workers: dict[str, Worker], targets: list[float], rounds: int
) -> dict[float, dict[str, list[dict[str, Any]]]]:
    """The answers by target and side; who comes first changes each round."""
    found: dict[float, dict[str, list[dict[str, Any]]]] = {t: {side: [] for side in workers} for t in targets}
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for target in targets:
            for side in list(workers)[:: 1 if turn % 2 else -1]:
                workers[side].ask({"do": "time", "target": target})
                found[target][side].append(workers[side].answer())
    return found


def summary(shape: str, target: float, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both sides, this one's over the other's, and how far the rounds' ratios lie apart."""
    row: dict[str, Any] = {"shape": shape, "target": target}
    for measure in MEASURES:
        times = {side: [each[measure] for each in found] for side, found in answers.items()}
        ratios = [this / other for this, other in zip(times["this"], times["other"], strict=True)]
        row[measure] = {
            **{side: round(statistics.median(each), 4) for side, each in times.items()},
            "ratio": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4),
            "rounds": {side: [round(each, 4) for each in found] for side, found in times.items()},
        }
    texts = {side: {each["tokens"] for each in found} for side, found in answers.items()}
    row["repeatable"] = {side: len(each) == 1 for side, each in texts.items()}
    row["same_tokens"] = texts["this"] == texts["other"]
    return row


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """A line per shape, target and measure; ratios below 1 mean that this checkout is faster."""
    made = Table(title=title)
    for heading in ("shape", "sparsity", "", "other", "this", "this / other", "of the rounds", "same tokens"):
        made.add_column(heading, justify="right")
    for row in rows:
        for measure, name in MEASURES.items():
            found = row[measure]
            cells = [f"{found[side]:.3f}" for side in SIDES]
            spread = f"{found['lowest']:.3f}–{found['highest']:.3f}"
            same = ("yes" if row["same_tokens"] else "no") if measure == "step_ms" else ""
            made.add_row(row["shape"], f"{row['target']:.0%}", name, *cells, f"{found['ratio']:.3f}", spread, same)
    return made


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a folder with the other commit's files")
    parser.add_argument("--this", type=Path, default=ROOT, help="by default this checkout")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=["llama-3-8b", "llama-3.2-1b"])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=96, help="decoded each time, more than 24")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.tokens <= 24:
        parser.error("--tokens must be more than 24")
    folders = {"other": arguments.other.resolve(), "this": arguments.this.resolve()}
    rows, notes = [], []
    for shape in arguments.shapes:
        about, found = compare(shape, folders, arguments)
        for row in found:
            sys.stdout.write(json.dumps({"about": about} | row) + "\n")
        sys.stdout.flush()
        rows += found
        for side in SIDES:
            each = about[side]
            notes.append(
                f"{shape}, {side}: first generate() {each['first_generate_s']:.1f} s, "
                f"{each['recompiled']} graphs compiled for other lengths, {each['step']}"
                + (f"; NOT COMPILED: {each['declined']}" if each["declined"] else "")
            )
    console = Console(width=140, soft_wrap=True)
    console.print(table(rows, f"decode, bf16, batch 1, {about['this']['device']}, torch {about['this']['torch']}"))
    for note in notes:
        console.print(note)


START = time.perf_counter()

if __name__ == "__main__":
    main()

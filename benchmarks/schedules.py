"""What scores and allocations are worth: perplexity of the embedded model by recipe, score, level and seed.

    python benchmarks/schedules.py --valid books.valid.txt --test books.test.txt --out schedules.jsonl

Schedules are searched on windows spread over the validation text and reported on windows spread over the test text, all
but the first 1 % of tokens sparse. Loss is compared at equal realised bytes: each schedule is also measured with all
thresholds scaled a little, and its loss read between the two where the realised sparsity is the target. Rows that are
in the file already are not measured again; without --valid and --test, the texts inside was-fx are used.
"""

import argparse
import dataclasses
import json
import lzma
import math
import statistics
import time
from pathlib import Path

import torch
from environment import describe

import was_fx
from was_fx import embedded
from was_fx.schedules.score import Score
from was_fx.schedules.search.greedy import Greedy
from was_fx.schedules.search.recipes import RECIPES, Recipe

LENGTH = 512
SEARCH_SEEDS = 5
SCORES = {"|x|": Score(0.0, 1), "|x|·‖W‖₁": Score(1.0, 1), "|x|·‖W‖₂": Score(1.0, 2), "|x|·‖W‖₂^½": Score(0.5, 2)}


def recipe(name: str, score: str, step: float) -> Recipe:
    """A recipe's allocation with another score, and one step of the greedy descent for all; "refined" is `exact` with
    trials over blocks after it."""
    if name == "random":
        base = dataclasses.replace(RECIPES["was"], name="random", over="random")
    else:
        base = RECIPES[{"greedy": "teal", "refined": "exact"}.get(name, name)]
    chosen = None if score == "searched" else SCORES[score]
    return dataclasses.replace(base, score=chosen, greedy=Greedy(step=step))


def plan(seeds: int) -> list[tuple[float, str, str, int]]:
    """(level, allocation, score, seed), what matters most first; a search by Bayes and by chance from 5 seeds last."""
    main = [("uniform", "|x|"), ("greedy", "|x|"), ("exact", "|x|·‖W‖₁"), ("was", "|x|·‖W‖₁")]
    more = [("uniform", score) for score in (*list(SCORES)[1:], "searched")]
    more += [("greedy", "|x|·‖W‖₁"), ("exact", "|x|"), ("greedy", "|x|·‖W‖₂"), ("wisparse", "searched")]
    high, low = (0.6, 0.75), (0.5, 0.4)
    rows = [(level, *each, 0) for levels in (high, low) for each in main for level in levels]
    rows += [(level, *each, seed) for seed in range(1, seeds) for each in main[2:] for level in high]
    rows += [(level, *each, 0) for each in more for level in high]
    rows += [(0.75, "random", "|x|·‖W‖₁", seed) for seed in range(SEARCH_SEEDS)]
    rows += [(0.75, "was", "|x|·‖W‖₁", seed) for seed in range(seeds, SEARCH_SEEDS)]
    rows += [(level, *each, 0) for each in more for level in low]
    rows += [(level, *each, seed) for seed in range(1, seeds) for each in main[2:] for level in low]
    rest = [("wisparse", "searched"), ("exact", "|x|")]
    rows += [(level, *each, seed) for each in rest for seed in range(1, seeds) for level in (*high, *low)]
    rows += [(level, "refined", "|x|·‖W‖₁", 0) for level in high]
    return rows


def windows(path: Path | None, split: str, count: int, offset: float = 0.0) -> torch.Tensor:
    """Windows [count, 512] spread evenly over a text."""
    if path is None:
        ids = embedded.tokens(split, LENGTH)
    else:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        tokenizer = embedded.load()[1]
        flat = torch.tensor(tokenizer(text)["input_ids"])
        ids = flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH)
    at = ((torch.arange(count) + offset) / count * len(ids)).long()
    return ids[at]


class Bench:
    """The model, its texts and calibrations, and the greedy tables, made once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = embedded.load(torch.float32)[0]
        self.valid = windows(arguments.valid, "validation", arguments.windows)
        self.samples = windows(arguments.valid, "validation", arguments.windows, 0.5)
        self.test = windows(arguments.test, "test", arguments.test_windows, 0.5)
        self.step, self.trials = arguments.step, arguments.trials
        self.calibrations: dict[Score | None, was_fx.Calibration] = {}
        self.tables: dict = {}

    def calibration(self, score: Score | None) -> was_fx.Calibration:
        if score not in self.calibrations:
            self.calibrations[score] = was_fx.calibrate(self.model, self.samples, score=score, batch_size=4)
        return self.calibrations[score]

    def row(self, level: float, name: str, score: str, seed: int) -> dict:
        chosen = recipe(name, score, self.step)
        start = time.perf_counter()
        states: list = []
        schedule = was_fx.search(
            self.model,
            self.calibration(chosen.score),
            tokens=self.valid,
            target=level,
            recipe=chosen,
            trials=self.trials if chosen.searches or name == "refined" else None,
            seed=seed,
            calibration_tokens=self.samples,
            batch_size=4,
            progress=states.append,
            level_tables=self.tables.setdefault((chosen.score, level if chosen.score is None else 0), {}),
        )
        seconds = time.perf_counter() - start
        loss, realised, equal = self.measure(schedule, level)
        history = schedule.metadata.history
        return {
            "level": level,
            "allocation": name,
            "score": score,
            "seed": seed,
            "nominal": schedule.sparsity,
            "realised": round(realised, 5),
            "loss": round(loss, 5),
            "loss_at_equal_bytes": round(equal, 5),
            "perplexity": round(math.exp(equal), 2),
            "validation": min(history["best"]) if history.get("best") else None,
            "tokens": history["tokens"],
            "optimizer_seconds": round(max(state.optimizer_seconds for state in states), 1),
            "stopped": history.get("stopped", 0),
            "seconds": round(seconds, 1),
            "blocks": history.get("levels", []),
        }

    def measure(self, schedule: was_fx.Schedule, level: float) -> tuple[float, float, float]:
        """Loss, realised sparsity, and the loss where the realised sparsity is the level."""
        found = []
        factor = 1.0
        for _ in range(2):
            entries = {
                name: dataclasses.replace(entry, threshold=entry.threshold * factor)
                for name, entry in schedule.linears.items()
            }
            was_fx.sparsify(self.model, schedule.replace(entries))
            result = was_fx.evaluate(self.model, self.test, batch_size=4)
            found.append((result.realised, result.loss))
            factor = math.exp(max(-0.2, min(0.2, 2.5 * (level - result.realised) or 0.01)))
        was_fx.densify(self.model)
        (first, loss), (second, other) = found
        share = (level - first) / (second - first) if abs(second - first) > 1e-6 else 0.0
        return loss, first, loss + max(-1.0, min(2.0, share)) * (other - loss)

    def dense(self) -> float:
        return was_fx.evaluate(self.model, self.test, batch_size=4).perplexity


def show(rows: list[dict], seeds: int) -> None:
    """One Markdown table: perplexity at equal realised bytes, mean over seeds ± spread, and the search's tokens."""
    levels = sorted({row["level"] for row in rows if "level" in row})
    print("| allocation | score | " + " | ".join(f"{100 * level:g} %" for level in levels) + " | tokens | seconds |")
    print("|---|---|" + "---|" * (len(levels) + 2))
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "level" in row:
            groups.setdefault((row["allocation"], row["score"]), []).append(row)
    for (allocation, score), found in groups.items():
        if allocation == "random":
            continue
        cells = []
        for level in levels:
            values = [row["perplexity"] for row in found if row["level"] == level and row["seed"] < seeds]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "–")
        spent = statistics.median(sum(row["tokens"].values()) for row in found)
        seconds = statistics.median(row["seconds"] for row in found)
        print(f"| {allocation} | {score} | " + " | ".join(cells) + f" | {spent / 1000:,.0f} k | {seconds:.0f} |")


def show_searches(rows: list[dict]) -> None:
    """Search over blocks by Bayes and by chance, of equally many trials: best validation loss and test perplexity."""
    print("| over blocks, 75 % | seed | best validation loss | perplexity |\n|---|---|---|---|")
    for row in rows:
        if row.get("level") == 0.75 and row["allocation"] in ("was", "random"):
            name = {"was": "Bayesian"}.get(row["allocation"], "random")
            print(f"| {name} | {row['seed']} | {row['validation']:.4f} | {row['perplexity']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=Path, help="validation text, plain or .xz")
    parser.add_argument("--test", type=Path, help="test text, plain or .xz; for the report only")
    parser.add_argument("--out", type=Path, default=Path("schedules.jsonl"))
    parser.add_argument("--windows", type=int, default=16, help="validation windows of 512 tokens per trial")
    parser.add_argument("--test-windows", type=int, default=32)
    parser.add_argument("--trials", type=int, default=50, help="trials of a search over blocks")
    parser.add_argument("--step", type=float, default=0.05, help="step of the greedy descent")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="only print the table of the rows that are there")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    if not arguments.show:
        bench = Bench(arguments)
        done = {(row["level"], row["allocation"], row["score"], row["seed"]) for row in rows if "level" in row}
        with open(arguments.out, "a") as file:
            if not rows:
                rows.append({**describe(), "dense": round(bench.dense(), 2)})
                print(json.dumps(rows[-1]), file=file, flush=True)
            for each in plan(arguments.seeds):
                if each not in done:
                    rows.append(bench.row(*each))
                    print(json.dumps(rows[-1], ensure_ascii=False), file=file, flush=True)
    print(json.dumps(rows[0]))
    show(rows, arguments.seeds)
    show_searches(rows)


if __name__ == "__main__":
    main()

"""What sparsity, formats of weights and recipes cost a pretrained model: perplexity at each, resumable.

    python scripts/real_models.py smollm2-135m --to models
    python benchmarks/quality.py models/smollm2-135m --valid wikitext2.valid.txt.xz --out quality.jsonl --seeds 3 \
        --test wikitext2=wikitext2.test.txt.xz --test books=books.test.txt.xz --formats bf16 int8 int4

Calibration and search see windows of the validation text only; the seed says which windows, and seeds the search. Loss
is over blocks of 2048 tokens (or as many as the model has positions), all but the first 1 % of each sparse. Thresholds
of every recipe are measured while the model drops channels. "excess" is perplexity above the dense model of the same
format, as a share of what the recipe `uniform` has. The model `embedded` and its texts are inside was-fx. Rows that are
in the file already are not measured again.
"""

import argparse
import json
import lzma
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from environment import describe
from rich.console import Console
from rich.table import Table

import was_fx
from was_fx import embedded
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.schedules.search.recipes import find_recipe

WINDOW, WINDOWS = 512, 32
BLOCK = 2048


def read(path: Path) -> str:
    """A text file, which may be compressed by xz."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


class Bench:
    """A model in one format at a time, and its texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.blocks: dict[str, torch.Tensor] = {}
        self._format: str | None = None
        tokenizer = self._load("bf16")
        longest = min(BLOCK, self.model.config.max_position_embeddings)
        if arguments.model == "embedded":
            self.valid = embedded.tokens("validation", WINDOW)
            self.blocks = {"own": embedded.tokens("test", longest)[: arguments.blocks]}
            return
        texts = {name: Path(path) for name, path in (each.split("=", 1) for each in arguments.test)}
        self.valid = self._cut(self._ids(tokenizer, arguments.valid), WINDOW)
        for name, path in texts.items():
            self.blocks[name] = self._cut(self._ids(tokenizer, path), longest)[: arguments.blocks]

    def _load(self, format: str):
        if self._format == format:
            return None
        dtype = torch.float32 if self.arguments.device == "cpu" else torch.bfloat16
        if self.arguments.model == "embedded":
            self.model, tokenizer = embedded.load(dtype)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.arguments.model)
            self.model = AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=dtype)
        self.model.to(self.arguments.device).eval()
        if format != "bf16":
            was_fx.quantize(self.model, format, tokens=self.samples(0, 64) if format == "int4" else None)
        self._format = format
        return tokenizer

    @staticmethod
    def _ids(tokenizer, path: Path) -> torch.Tensor:
        return torch.tensor(tokenizer(read(path), add_special_tokens=False)["input_ids"])

    @staticmethod
    def _cut(ids: torch.Tensor, length: int) -> torch.Tensor:
        return ids[: len(ids) // length * length].view(-1, length)

    def samples(self, seed: int, count: int = WINDOWS) -> torch.Tensor:
        """Windows spread over the validation text, others for each seed."""
        at = ((torch.arange(count) + (0.37 * seed) % 1) / count * len(self.valid)).long()
        return self.valid[at]

    def rows(self, done: set[tuple]) -> Iterator[dict]:
        """What is not measured yet."""
        a = self.arguments
        for format in a.formats:
            for seed in range(a.seeds):
                wanted = [("dense", 0.0)] if seed == 0 else []
                wanted += [(recipe, target) for recipe in a.recipes for target in a.targets]
                wanted = [each for each in wanted if (format, *each, seed) not in done]
                if not wanted:
                    continue
                self._load(format)
                calibrations: dict = {}
                for recipe, target in wanted:
                    yield self.row(format, recipe, target, seed, calibrations)

    def row(self, format: str, recipe: str, target: float, seed: int, calibrations: dict) -> dict:
        model, batch = self.model, self.arguments.batch_size
        found = {"format": format, "recipe": recipe, "target": target, "seed": seed}
        start = time.perf_counter()
        if recipe != "dense":
            schedule = self.schedule(recipe, target, seed, calibrations)
            found |= {"seconds": round(time.perf_counter() - start, 2), "nominal": schedule.sparsity}
            was_fx.sparsify(model, schedule)
        read_bytes = weight_bytes_per_token(model)
        for name, blocks in self.blocks.items():
            measured = was_fx.evaluate(model, blocks, batch_size=batch)
            found[name] = measured.perplexity
            found |= {"realised": measured.realised, "bytes": round(read_bytes * (1 - measured.bytes_saved))}
        was_fx.densify(model)
        return found

    def schedule(self, recipe: str, target: float, seed: int, calibrations: dict) -> was_fx.Schedule:
        samples, batch = self.samples(seed), self.arguments.batch_size
        chosen = find_recipe(recipe)
        key = (chosen.score, recipe == "fisher")
        if key not in calibrations:
            start = time.perf_counter()
            calibrations[key] = was_fx.calibrate(
                self.model, samples, score=chosen.score, fisher=recipe == "fisher", seed=seed, batch_size=batch
            )
            print(f"calibration of {recipe}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if recipe == "uniform":
            uniform = was_fx.uniform(calibrations[key], target)
            return was_fx.recalibrate(self.model, uniform, samples[:8], batch_size=batch)
        return was_fx.search(
            self.model,
            calibrations[key],
            tokens=self.samples(seed + 0.5, 16),
            target=target,
            recipe=recipe,
            seed=seed,
            calibration_tokens=samples,
            batch_size=batch,
        )


def table(rows: list[dict], title: str) -> Table:
    """Means over the seeds."""
    texts = [name for name in rows[0] if name not in KEYS]
    made = Table(title=title)
    for heading in ("format", "recipe", "target", "realised", "MB a token", *texts, *(f"excess {t}" for t in texts)):
        made.add_column(heading, justify="right")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["format"], row["recipe"], row["target"]), []).append(row)

    def mean(key: tuple, what: str) -> float | None:
        return statistics.fmean(row[what] for row in groups[key]) if key in groups else None

    for key in groups:
        format, recipe, target = key
        cells = [format, recipe, f"{target:.0%}", f"{mean(key, 'realised'):.1%}", f"{mean(key, 'bytes') / 1e6:.1f}"]
        cells += [f"{mean(key, text):.2f}" for text in texts]
        for text in texts:
            dense, uniform = mean((format, "dense", 0.0), text), mean((format, "uniform", target), text)
            known = recipe != "dense" and dense is not None and uniform is not None
            cells.append(f"{(mean(key, text) - dense) / (uniform - dense):.2f}" if known else "")
        made.add_row(*cells)
    return made


KEYS = {"format", "recipe", "target", "seed", "seconds", "nominal", "realised", "bytes", "model", "device", "threads",
        "torch", "transformers", "was_fx", "commit"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a name on the Hub, or `embedded`")
    parser.add_argument("--valid", type=Path, help="text for calibration and search")
    parser.add_argument("--test", action="append", default=[], metavar="NAME=FILE", help="texts for the table")
    parser.add_argument("--formats", nargs="+", default=["bf16"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--recipes", nargs="+", default=["uniform", "fisher"], help="as was search --recipe")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="blocks of each test text; by default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a row each")
    arguments = parser.parse_args()
    if arguments.model != "embedded" and (arguments.valid is None or not arguments.test):
        parser.error("give --valid FILE and --test NAME=FILE, or the model `embedded`")
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["format"], row["recipe"], row["target"], row["seed"]) for row in rows}
    common = {"model": arguments.model} | describe(arguments.device)
    with arguments.out.open("a") as out:
        for row in Bench(arguments).rows(done):
            rows.append(row | common)
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            print({key: row[key] for key in row}, file=sys.stderr, flush=True)
    Console(width=160).print(table(rows, f"{arguments.model}, {common['device']}"))


if __name__ == "__main__":
    main()

"""What sparsity, formats of weights and recipes cost a pretrained model, and what they win: perplexity, sentence pairs
and time per token at each, resumable.

    python scripts/real_models.py smollm2-135m --to models
    python benchmarks/quality.py models/smollm2-135m --valid wikitext2.valid.txt.xz --out quality.jsonl --seeds 3 \
        --test wikitext2=wikitext2.test.txt.xz --test books=books.test.txt.xz --formats bf16 int8 int4
    python benchmarks/quality.py models/smollm2-135m --valid wikitext2.valid.txt.xz --out cpu.jsonl --blocks 4 \
        --test wikitext2=wikitext2.test.txt.xz --formats bf16 int8 int4 --targets 0.25 0.4 0.5 --dtype bfloat16 \
        --pairs blimp.jsonl.xz --speed --plot cpu.png

Calibration and search see windows of the validation text only; the seed says which windows, and seeds the search. Loss
is over blocks of 2048 tokens (or as many as the model has positions), all but the first 1 % of each sparse. Thresholds
of every recipe are measured while the model drops channels. "excess" is perplexity above the dense model of the same
format, as a share of what the recipe `uniform` has. The model `embedded` and its texts are inside was-fx. Rows that are
in the file already are not measured again.

--pairs takes sentence pairs such as BLiMP's, so many spread over the file, through the lm-eval plug-in. --speed times
greedy decoding after all else is measured, everything of a format in turns; on a CPU nothing is compiled. With
--schedules DIR the schedules are made once, of the first format, kept there, and used for every format.
"""

import argparse
import json
import lzma
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from environment import describe
from rich.console import Console
from rich.table import Table

import was_fx
from was_fx import embedded
from was_fx.cli.input.texts import cut_windows, opening_ids
from was_fx.measure.speed import decode_speed
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.schedules.search.recipes import find_recipe

WINDOW, BLOCK = 512, 2048


def read(path: Path) -> str:
    """A text file, which may be compressed by xz."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


class Bench:
    """A model in one format at a time, and its texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.blocks: dict[str, torch.Tensor] = {}
        self.calibrations: dict[tuple, was_fx.Calibration] = {}
        self._format: str | None = None
        self.tokenizer = self._load("bf16")
        longest = min(BLOCK, self.model.config.max_position_embeddings)
        if arguments.model == "embedded":
            self.valid = embedded.tokens("validation", WINDOW)
            self.blocks = {"own": embedded.tokens("test", longest)[: arguments.blocks]}
            return
        texts = {name: Path(path) for name, path in (each.split("=", 1) for each in arguments.test)}
        self.valid = self._windows(arguments.valid, WINDOW)
        for name, path in texts.items():
            self.blocks[name] = self._windows(path, longest)[: arguments.blocks]

    def _load(self, format: str):
        if self._format == format:
            return None
        dtype = getattr(torch, self.arguments.dtype)
        if self.arguments.model == "embedded":
            self.model, tokenizer = embedded.load(dtype)
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.arguments.model)
            self.model = AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=dtype)
        self.model.to(self.arguments.device).eval()
        if format != "bf16":
            was_fx.quantize(
                self.model, format, tokens=self.samples(0, self.arguments.fit) if format == "int4" else None
            )
        self._format = format
        return tokenizer

    def _windows(self, path: Path, length: int) -> torch.Tensor:
        ids = torch.tensor(self.tokenizer(read(path), add_special_tokens=False)["input_ids"])
        return cut_windows(ids, length, opening_ids(self.tokenizer))

    def samples(self, seed: float, count: int | None = None) -> torch.Tensor:
        """Windows spread over the validation text, others for each seed."""
        count = count or self.arguments.windows
        at = ((torch.arange(count) + (0.37 * seed) % 1) / count * len(self.valid)).long()
        return self.valid[at]

    def rows(self, done: set[tuple]) -> Iterator[dict]:
        """What is not measured yet."""
        a = self.arguments
        for format in a.formats:
            for seed in range(a.seeds):
                every = self.wanted()[1 if seed else 0 :]  # dense does not depend on the seed
                wanted = [each for each in every if (format, *each, seed) not in done]
                if not wanted:
                    continue
                self._load(format)
                for recipe, target in wanted:
                    yield self.row(format, recipe, target, seed)

    def row(self, format: str, recipe: str, target: float, seed: int) -> dict:
        model, batch = self.model, self.arguments.batch_size
        found = {"format": format, "recipe": recipe, "target": target, "seed": seed}
        start = time.perf_counter()
        if recipe != "dense":
            schedule = self.schedule(recipe, target, seed)
            found |= {"seconds": round(time.perf_counter() - start, 2), "nominal": schedule.sparsity}
            was_fx.sparsify(model, schedule)
        read_bytes = weight_bytes_per_token(model)
        for name, blocks in self.blocks.items():
            measured = was_fx.evaluate(model, blocks, batch_size=batch)
            found[name] = measured.perplexity
            found[f"realised {name}"] = measured.realised
            found.setdefault("bytes", round(read_bytes * (1 - measured.bytes_saved)))  # of the first text
        was_fx.densify(model)
        return found

    def pairs(self, done: set[tuple]) -> Iterator[dict]:
        """Rows with the share of sentence pairs that the model gets right, of one seed."""
        a = self.arguments
        for format in a.formats:
            for recipe, target in (each for each in self.wanted() if (format, *each, 0) not in done):
                self._load(format)
                if recipe != "dense":
                    was_fx.sparsify(self.model, self.schedule(recipe, target, 0))
                yield {"format": format, "recipe": recipe, "target": target, "seed": 0} | self.accuracy()
                was_fx.densify(self.model)

    def wanted(self) -> list[tuple[str, float]]:
        """(recipe, target) of all that is measured of a format."""
        pairs = [(recipe, target) for recipe in self.arguments.recipes for target in self.arguments.targets]
        return [("dense", 0.0), *pairs]

    def accuracy(self) -> dict[str, float]:
        """Of the model as it is, with the standard error."""
        from was_fx.plugins.lm_eval import WasLM, minimal_pairs, run_tasks

        lines = read(self.arguments.pairs).splitlines()
        chosen = lines[:: max(1, len(lines) // self.arguments.pairs_limit)][: self.arguments.pairs_limit]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.jsonl"
            path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
            lm = WasLM(self.model, tokenizer=self.tokenizer, batch_size=16)
            found = run_tasks(lm, [minimal_pairs(path)])["pairs"]
        return {"pairs": found["acc,none"], "pairs_error": found["acc_stderr,none"], "pairs_count": len(chosen)}

    def speeds(self, done: set[tuple]) -> Iterator[dict]:
        """Rows with the time per token, of one seed; a format's all in turns."""
        a = self.arguments
        wanted = self.wanted()
        for format in a.formats:
            if {(format, *each, 0) for each in wanted} <= done:
                continue
            self._load(format)
            schedules = [self.schedule(recipe, target, 0) for recipe, target in wanted[1:]]
            own = format == a.formats[0]
            rows = decode_speed(
                self.model,
                [*([] if own else [0.0]), *schedules],
                text=self.valid,
                with_dense=own,
                repetitions=a.repetitions,
                lowering="eager" if a.device == "cpu" else None,
            )
            for (recipe, target), row in zip(wanted, rows, strict=True):
                setting = {"format": format, "recipe": recipe, "target": target, "seed": 0}
                yield setting | {"ms": row.ms, "spread": [min(row.repetitions), max(row.repetitions)]}

    def schedule(self, recipe: str, target: float, seed: int) -> was_fx.Schedule:
        if self.arguments.schedules is None:
            return self.made(recipe, target, seed)
        path = self.arguments.schedules / f"{recipe}-{100 * target:g}-{seed}.was.safetensors"
        if not path.exists():
            self.made(recipe, target, seed).save(path)
        return was_fx.Schedule.load(path)

    def made(self, recipe: str, target: float, seed: int) -> was_fx.Schedule:
        """By the recipe, of the model in its format of now."""
        samples, batch = self.samples(seed), self.arguments.batch_size
        chosen = find_recipe(recipe)
        if self.arguments.corrections is not None:
            chosen = replace(chosen, fisher=replace(chosen.fisher, corrections=self.arguments.corrections))
        key = (self._format, seed, chosen.score, recipe == "fisher")
        if key not in self.calibrations:
            start = time.perf_counter()
            self.calibrations[key] = was_fx.calibrate(
                self.model, samples, score=chosen.score, fisher=recipe == "fisher", seed=seed, batch_size=batch
            )
            print(f"calibration of {recipe}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if recipe == "uniform":
            uniform = was_fx.uniform(self.calibrations[key], target)
            return was_fx.recalibrate(self.model, uniform, samples[:8], batch_size=batch)
        return was_fx.search(
            self.model,
            self.calibrations[key],
            tokens=self.samples(seed + 0.5, 16),
            target=target,
            recipe=chosen,
            seed=seed,
            calibration_tokens=samples,
            batch_size=batch,
        )


def grouped(rows: list[dict]) -> dict[tuple, dict]:
    """By (format, recipe, target): the mean over the seeds of all that was measured."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["format"], row["recipe"], row["target"]), []).append(row)
    found = {}
    for key, those in groups.items():
        names = {name for row in those for name, value in row.items() if isinstance(value, (int, float))}
        found[key] = {name: statistics.fmean(row[name] for row in those if name in row) for name in names - {"seed"}}
    return found


def texts_of(rows: list[dict]) -> list[str]:
    """Names of the texts that the rows have perplexities of."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in KEYS and not name.startswith("realised")]


def table(rows: list[dict], title: str) -> Table:
    """Means over the seeds."""
    texts, groups = texts_of(rows), grouped(rows)
    made = Table(title=title)
    headings = ["format", "recipe", "target", *(f"realised {t}" for t in texts), "MB a token", *texts]
    headings += [f"excess {t}" for t in texts]
    for heading in (*headings, "pairs", "ms a token", "faster"):
        made.add_column(heading, justify="right")
    for (format, recipe, target), found in groups.items():
        dense, uniform = groups.get((format, "dense", 0.0), {}), groups.get((format, "uniform", target), {})

        def cell(name: str, form: str, scale: float = 1.0, found: dict = found) -> str:
            return f"{found[name] / scale:{form}}" if name in found else ""

        cells = [format, recipe, f"{target:.0%}", *(cell(f"realised {text}", ".1%") for text in texts)]
        cells += [cell("bytes", ".1f", 1e6), *(cell(text, ".2f") for text in texts)]
        for text in texts:
            known = recipe != "dense" and all(text in each for each in (found, dense, uniform))
            cells.append(f"{(found[text] - dense[text]) / (uniform[text] - dense[text]):.2f}" if known else "")
        cells.append(f"{found['pairs']:.3f} ± {found['pairs_error']:.3f}" if "pairs" in found else "")
        first = groups.get((rows[0]["format"], "dense", 0.0), {})
        cells += [
            cell("ms", ".1f"),
            f"{first['ms'] / found['ms']:.2f}×" if {"ms"} <= first.keys() & found.keys() else "",
        ]
        made.add_row(*cells)
    return made


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Loss of the first text against time: a line for each format and recipe, a point for each sparsity."""
    from matplotlib.figure import Figure

    text, groups = texts_of(rows)[0], grouped(rows)
    shown = {key: found for key, found in groups.items() if "ms" in found and text in found}
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    for number, format in enumerate(dict.fromkeys(format for format, _, _ in shown)):
        for recipe in dict.fromkeys(recipe for _, recipe, _ in shown if recipe != "dense"):
            line = [(t, f) for (each, r, t), f in shown.items() if each == format and r in ("dense", recipe)]
            line.sort(key=lambda each: each[0])
            ours = recipe != "uniform"
            style = {"linestyle": "-" if ours else ":", "marker": "o" if ours else "x", "alpha": 1 if ours else 0.6}
            places = [(found["ms"], found[text]) for _, found in line]
            axes.plot(*zip(*places, strict=True), color=f"C{number}", label=f"{format}, {recipe}", **style)
            for (target, _), place in zip(line, places, strict=True):
                if ours:
                    axes.annotate(f"{target:.0%}", place, xytext=(4, -11), textcoords="offset points", fontsize=8)
    axes.set(xlabel="ms per token (left is faster)", ylabel=f"perplexity, {text} (down is better)", title=title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


KEYS = {"format", "recipe", "target", "seed", "seconds", "nominal", "bytes", "pairs", "pairs_error",
        "pairs_count", "ms", "spread", "model", "dtype", "device", "threads", "torch", "transformers", "was_fx",
        "commit"}  # fmt: skip


def done(rows: list[dict], what: str) -> set[tuple]:
    """Of what there are rows that have been measured so."""
    return {(row["format"], row["recipe"], row["target"], row["seed"]) for row in rows if what in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a name on the Hub, or `embedded`")
    parser.add_argument("--valid", type=Path, help="text for calibration and search")
    parser.add_argument("--test", action="append", default=[], metavar="NAME=FILE", help="texts for the table")
    parser.add_argument("--formats", nargs="+", default=["bf16"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--recipes", nargs="+", default=["uniform", "fisher"], help="as was search --recipe")
    parser.add_argument("--corrections", type=int, metavar="N", help="of Fisher weights, as was search --corrections")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="blocks of each test text; by default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="by default bfloat16, on a CPU float32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--fit", type=int, default=64, help="windows that int4 is fitted to")
    parser.add_argument("--schedules", type=Path, metavar="DIR", help="keep schedules, of the first format for all")
    parser.add_argument("--pairs", type=Path, help="JSON lines with sentence_good and sentence_bad")
    parser.add_argument("--pairs-limit", type=int, default=1340, metavar="N", help="pairs to use of them")
    parser.add_argument("--speed", action="store_true", help="time decoding too")
    parser.add_argument("--repetitions", type=int, default=5, help="of what is timed")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against time")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a row each")
    arguments = parser.parse_args()
    if arguments.model != "embedded" and arguments.valid is None:
        parser.error("give --valid FILE, or the model `embedded`")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.schedules is not None:
        arguments.schedules.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    common = {"model": arguments.model, "dtype": arguments.dtype} | describe(arguments.device)
    bench = Bench(arguments)
    with arguments.out.open("a") as out:
        for row in chain(
            bench.rows(done(rows, "bytes")) if bench.blocks else (),
            bench.pairs(done(rows, "pairs")) if arguments.pairs else (),
            bench.speeds(done(rows, "ms")) if arguments.speed else (),
        ):
            rows.append(row | common)
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            print({key: row[key] for key in row}, file=sys.stderr, flush=True)
    if arguments.plot:
        draw(rows, arguments.plot, f"{Path(arguments.model).name}, {common['device']}, {common['threads']} threads")
    Console(width=160).print(table(rows, f"{arguments.model}, {common['device']}"))


if __name__ == "__main__":
    main()

"""Tile sizes of the four products of a decoder block, chosen where they run: in a chain of blocks, on a GPU.

    python benchmarks/tiles_in_chain.py llama-3-8b:bfloat16 llama-3-8b:int4
    python benchmarks/tiles_in_chain.py qwen2.5-7b:int8 --seconds 600 --out kernels/parts/tuned/nvidia_h200.json
    TRITON_INTERPRET=1 python benchmarks/tiles_in_chain.py --tiny       # without a GPU: that everything runs

`was tune` times each product alone, so it can't see what a choice costs the kernel that adds the parts of a product, or
how well two kernels overlap. Here blocks with random weights of their own, more than the L2 cache holds, decode a token
in one CUDA graph at 50 and at 75 %: norms, attention over a short cache, products and the gated product, each of which
adds the parts of the product before it and lists channels for the next.

From the configurations in use, one product after the other tries others: those of the tuner, and neighbours of the
present one. One is taken if it multiplies rightly and makes the chain 0.5 % faster, twice. That ends when no product
changes any more, or after --seconds. With --out what was chosen is merged after every job into a file of tuned
configurations: the repository's, or the user's own, which `was tune` names. Prints one JSON line per job, and then a
table. Steps are told on stderr.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from block_chain import SPARSITIES, Chain
from environment import describe
from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from was_fx.kernels.parts.gemv_config import Format, GemvConfig, LinearsShape, multiprocessors
from was_fx.kernels.parts.triton_parts import interpreted
from was_fx.kernels.tune.tile_sizes import BATCH, candidates, correct, most_splits, tiles_of
from was_fx.measure.shapes import SHAPES, config
from was_fx.schedules.files.atomic import write_atomically

MODELS = [name for name, (kind, _) in SHAPES.items() if kind in ("llama", "mistral", "qwen2")]
FORMATS: dict[str, Format] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": "int8", "int4": "int4"}
TINY = SimpleNamespace(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
)
TINY_FORMATS: dict[str, Format] = {"float32": torch.float32, "int8": "int8", "int4": "int4"}
ORDER = ("down", "gate_up", "o", "qkv")
ROUNDS = 4
GAIN = 0.995  # what the chain's time must come down to


def options(shape: LinearsShape, present: GemvConfig, multiprocessors: int) -> list[GemvConfig]:
    """Configurations worth a try: the tuner's, its tiles with more splits, and neighbours of the present one."""
    most = most_splits(shape)

    def tiles(columns: int) -> int:
        return sum(triton.cdiv(n, columns) for n in shape.sizes)

    found = candidates(shape, multiprocessors)
    for rows, columns, warps in tiles_of(shape.format):
        wanted = 4 * round(multiprocessors / tiles(columns))
        found += [GemvConfig(rows, columns, splits, warps) for splits in (most // 2, most) if splits <= wanted]
    r, c, s, w = astuple(present)
    for rows, columns, warps in (
        (2 * r, c, w), (r // 2, c, w), (r, 2 * c, w), (r, c // 2, w),
        (2 * r, c // 2, w), (r // 2, 2 * c, w), (r, c, 2 * w), (r, c, w // 2),
    ):  # fmt: skip
        if rows and columns and warps:
            as_many = max(1, round(s * tiles(c) / tiles(columns)))  # programs as before
            found += [GemvConfig(rows, columns, splits, warps) for splits in (s, as_many)]
    found += [replace(present, splits=splits) for splits in (s - 2, s - 1, s + 1, s + 2, 2 * s, s // 2) if splits > 0]
    weight_bytes = {"int8": 1, "int4": 0.5}.get(str(shape.format), 2)

    def sensible(config: GemvConfig) -> bool:
        held = config.rows * config.columns * weight_bytes / (32 * config.warps)  # by a thread at once
        return (
            config.splits <= min(most, max(1, shape.channels // 32))
            and 16 <= config.rows <= 512
            and 32 <= config.columns <= 2 * triton.next_power_of_2(max(shape.sizes))
            and 2 <= config.warps <= 8
            and 16 <= held <= 256
        )

    return [each for each in dict.fromkeys(found) if each != present and sensible(each)]


class Search:
    """Descends from the configurations in use, product by product.

    Args:
        chain: what is timed.
        seconds: after which it ends.
        most: options of a product that are tried; None: all.

    Attributes:
        best: configurations until now.
        tried: how many were timed.
    """

    def __init__(self, chain: Chain, seconds: float, most: int | None = None) -> None:
        self.chain, self.most = chain, most
        self.until = time.monotonic() + seconds
        self.best = dict(chain.present)
        self.tried = 0
        self._right: dict[tuple[str, GemvConfig], bool] = {}

    def late(self) -> bool:
        return time.monotonic() > self.until

    def descend(self, rounds: int = ROUNDS) -> None:
        """Until no product changes any more, so many rounds are over, or time is up."""
        settled = 0
        for name in ORDER * rounds:
            settled = 0 if self.improve(name) else settled + 1
            if settled == len(ORDER) or self.late():
                return

    def improve(self, name: str) -> bool:
        """Try the options of one product; whether one was taken."""
        shape, now = self.chain.shapes[name], self.best[name]
        configs = options(shape, now, multiprocessors(self.chain.device))[: self.most]
        measured: list[tuple[float, GemvConfig]] = []
        for start in range(0, len(configs), BATCH):
            batch = [each for each in configs[start : start + BATCH] if not self.late() and self.right(name, each)]
            if batch and not self.late():
                measured += zip(self.ratios(name, batch, SPARSITIES[:1], 4), batch, strict=True)
        self.tried += len(measured)
        best = [each for _, each in sorted(measured, key=lambda pair: pair[0])[:4]]
        ratios = self.ratios(name, best, SPARSITIES, 15) if best else []
        for ratio, each in sorted(zip(ratios, best, strict=True), key=lambda pair: pair[0])[:2]:
            if ratio <= GAIN and self.ratios(name, [each], SPARSITIES, 15)[0] <= GAIN:
                say(f"{name}: {short(now)} becomes {short(each)}, {ratio - 1:+.1%} ({len(measured)} tried)")
                self.best[name] = each
                return True
        say(f"{name}: {short(now)} stays ({len(measured)} tried)")
        return False

    def right(self, name: str, config: GemvConfig) -> bool:
        """Whether the product of the first block runs and is right with this configuration."""
        key = (name, config)
        if key not in self._right:
            try:
                self._right[key] = bool(correct(self.chain.shapes[name], [config], self.chain.cases[name]))
            except (TritonError, RuntimeError) as error:  # more registers or shared memory than there are
                if "CUDA error" in str(error):
                    raise
                self._right[key] = False
            if not self._right[key]:
                say(f"{name}: {short(config)} does not run, or is wrong")
        return self._right[key]

    def ratios(self, name: str, configs: Sequence[GemvConfig], sparsities: Sequence[float], turns: int) -> list[float]:
        """The chain's time with each of these for a product, by that of the best: means over sparsities."""
        sets = [self.best, *({**self.best, name: each} for each in configs)]
        times = [self.chain.times(sets, sparsity, turns) for sparsity in sparsities]
        return [statistics.mean(each[i] / each[0] for each in times) for i in range(1, len(sets))]

    def result(self) -> dict[str, Any]:
        """What was found, timed once more; where it is no faster after all, the configurations in use."""
        before = self.chain.present
        us = {s: self.chain.times([before, self.best], s, 25) for s in SPARSITIES}
        if self.best != before and statistics.mean(b / a for a, b in us.values()) > GAIN:
            say("in the end no faster: all stay")
            self.best = dict(before)
        if self.best == before:
            us = {s: [a, a] for s, (a, _) in us.items()}
        return {
            "blocks": len(self.chain.weights),
            "us": {f"{s:g}": {"before": round(a, 2), "after": round(b, 2)} for s, (a, b) in us.items()},
            "products": {
                name: {"key": shape.key, "before": asdict(before[name]), "after": asdict(self.best[name])}
                for name, shape in self.chain.shapes.items()
            },
            "tried": self.tried,
        }


def short(config: GemvConfig) -> str:
    return f"{config.rows}×{config.columns}, {config.splits} splits, {config.warps} warps"


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A line per job; of products only those that changed."""
    made = Table(title=title)
    for heading in ("model", "format", *(f"{s:.0%}, before → after" for s in SPARSITIES), "changed"):
        made.add_column(heading)
    for row in rows:
        times = [f"{us['before']:.1f} → {us['after']:.1f}" for us in row["us"].values()]
        changed = [
            f"{name}: {short(GemvConfig(**found['before']))} → {short(GemvConfig(**found['after']))}"
            for name, found in row["products"].items()
            if found["before"] != found["after"]
        ]
        made.add_row(row["model"], row["format"], *times, "\n".join(changed) or "nothing")
    return made


def read_tuned(path: Path, device: str) -> dict[str, Any]:
    """The content of a file of tuned configurations of this device; of none where there is no file yet."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder; --out takes a file in a folder that exists")
    if not path.exists():
        return {"configurations": {}, "microseconds": {}, "device": device}
    try:
        content = json.loads(path.read_text())
        for key in ("configurations", "microseconds"):
            content[key].keys()
        found = content.get("device", device)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is no file of tuned configurations; --out takes one, or a new file's name") from None
    if found != device:
        raise ValueError(f"{path} is of {found}; this is {device}, which needs a file of its own")
    return content


def merge(content: dict[str, Any], row: dict[str, Any]) -> None:
    """Put what a job chose into the content of a file; what was measured of other configurations goes."""
    content["versions"] = {"torch": row["torch"], "triton": triton.__version__}
    content["device"] = row["device"]
    for found in row["products"].values():
        if content["configurations"].get(found["key"]) != found["after"]:
            content["configurations"][found["key"]] = found["after"]
            content["microseconds"].pop(found["key"], None)


def job(text: str) -> tuple[str, str]:
    """(model, format) of MODEL:FORMAT."""
    model, _, format = text.partition(":")
    if model not in MODELS or format not in FORMATS:
        models, formats = ", ".join(MODELS), ", ".join(FORMATS)
        raise argparse.ArgumentTypeError(f"{text!r} is no MODEL:FORMAT; models: {models}; formats: {formats}")
    return model, format


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", type=job, metavar="MODEL:FORMAT", help="such as llama-3-8b:int4")
    parser.add_argument("--seconds", type=float, default=300, help="of each job at most (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="to merge the chosen configurations into")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU in place of jobs")
    arguments = parser.parse_args()
    if arguments.tiny == bool(arguments.jobs):
        parser.error("name one MODEL:FORMAT or more, or else --tiny")
    if arguments.tiny and not interpreted():
        parser.error("--tiny needs Triton's interpreter; set TRITON_INTERPRET=1")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; tile sizes are chosen on the GPU that will use them")
    device = "cpu" if arguments.tiny else "cuda"
    common = describe(device)
    try:
        content = read_tuned(arguments.out, str(common["device"])) if arguments.out else None
    except ValueError as error:
        parser.error(str(error))
    formats = TINY_FORMATS if arguments.tiny else FORMATS
    rows = []
    for model, format in [("tiny", each) for each in TINY_FORMATS] if arguments.tiny else arguments.jobs:
        begun = time.perf_counter()
        say(f"{model}, {format}")
        chain = Chain(TINY if arguments.tiny else config(model), formats[format], device)
        search = Search(chain, arguments.seconds, 1 if arguments.tiny else None)
        search.descend(1 if arguments.tiny else ROUNDS)
        row = {**common, "model": model, "format": format, **search.result()}
        row["seconds"] = round(time.perf_counter() - begun, 1)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        if content is not None:
            merge(content, row)
            write_atomically(arguments.out, json.dumps(content, indent=1) + "\n")
        rows.append(row)
        del chain, search
        if device == "cuda":
            torch.cuda.empty_cache()
    Console(width=160).print(table(rows, f"µs a block, batch 1, {common['device']}, torch {common['torch']}"))


START = time.perf_counter()

if __name__ == "__main__":
    main()

"""Decode speed on a GPU through a Hugging Face model with random weights, dense against sparse, static cache, batch 1.

    python benchmarks/decode.py                                    # Llama-3-8B shapes, bf16: about 40 GB and 4 minutes
    python benchmarks/decode.py --shape qwen2.5-7b --targets 0.5

Prints one JSON line per row (device, versions, commit, times, memory) and then a table.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict

from environment import describe
from rich.console import Console
from rich.table import Table

from was_fx.measure.gpu_speed import GpuRow, gpu_speed
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import random_model

_COLUMNS = {
    "sparsity": lambda row: f"{row.target:.0%}" if row.target else "dense",
    "realised": lambda row: f"{row.realised:.1%}" if row.target else "",
    "ms/step": lambda row: f"{row.step_ms:.3f}",
    "ratio": lambda row: f"{row.ratio:.2f}×" if row.ratio else "",
    "generate() ms/token": lambda row: f"{row.generate_ms:.3f}" if row.generate_ms else "",
    "GB read/token": lambda row: f"{row.bytes_per_token / 1e9:.2f}",
    "GB/s": lambda row: f"{row.bytes_per_token / row.step_ms / 1e6:.0f}",
    "prompt ms": lambda row: f"{row.prompt_ms:.1f}" if row.prompt_ms else "",
    "compile s": lambda row: f"{row.compile_s:.0f}" if row.compile_s else "",
    "recompiled": lambda row: str(row.recompiled),
    "kernels": lambda row: str(row.kernels or ""),
    "same tokens": lambda row: "yes" if row.repeatable else "NO",
    "peak GB": lambda row: f"{row.peak_bytes / 1e9:.1f}",
}


def table(rows: list[GpuRow], title: str) -> Table:
    """A row for each sparsity."""
    made = Table(title=title)
    for heading in _COLUMNS:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*[show(row) for show in _COLUMNS.values()])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.75])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="decoded per repetition")
    parser.add_argument("--skip-dense", action="store_true", help="time the sparse model only")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()

    start = time.perf_counter()
    changes = {"num_hidden_layers": arguments.blocks} if arguments.blocks else {}
    rows = gpu_speed(
        random_model(config(arguments.shape, **changes), device="cuda"),
        arguments.targets,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        with_dense=not arguments.skip_dense,
        progress=lambda text: print(f"{time.perf_counter() - start:5.0f} s  {text}", file=sys.stderr, flush=True),
    )
    common = describe("cuda") | {"shape": arguments.shape, "dtype": "bf16", "prompt": arguments.prompt, **changes}
    for row in rows:
        sys.stdout.write(json.dumps(common | asdict(row)) + "\n")
    Console(width=180).print(table(rows, f"{arguments.shape}, bf16, batch 1, {common['device']}"))


if __name__ == "__main__":
    main()

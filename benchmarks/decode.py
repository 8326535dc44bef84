"""Decode speed of a Hugging Face model with random weights, dense against sparse, batch 1.

    python benchmarks/decode.py                                     # a GPU, Llama-3-8B shapes: about 40 GB, 5 minutes
    python benchmarks/decode.py --shape qwen2.5-7b --targets 0.5
    python benchmarks/decode.py --head int8 --skip-dense            # the head as int8 beside bf16
    python benchmarks/decode.py --device cpu                        # Llama-3.2-1B shapes: about 6 GB and 5 minutes
    python benchmarks/decode.py --device cpu --blocks 2 --vocabulary 4096 --repetitions 3

On a GPU with a static cache, decode steps and `generate()`; on a CPU with a dynamic cache, `generate()`. Prints one
JSON line per row (device, versions, commit, times, memory) and then a table.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from environment import bandwidth, describe
from rich.console import Console
from rich.table import Table

from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import SpeedRow, decode_speed, random_model
from was_fx.modules.linears import head_linears

_COLUMNS: dict[str, Callable[[SpeedRow], str | None]] = {
    "sparsity": lambda row: f"{row.target:.0%}" if row.target else "dense",
    "realised": lambda row: f"{row.realised:.1%}" if row.target else None,
    "ms/step": lambda row: row.step_ms and f"{row.step_ms:.3f}",
    "generate() ms/token": lambda row: f"{row.ms_per_token:.3f}",
    "ratio": lambda row: row.ratio and f"{row.ratio:.2f}×",
    "GB read/token": lambda row: f"{row.bytes_per_token / 1e9:.3f}",
    "GB/s": lambda row: f"{row.bytes_per_token / row.ms / 1e6:.1f}",
    "prompt ms": lambda row: row.prompt_ms and f"{row.prompt_ms:.1f}",
    "first generate() s": lambda row: row.first_generate_s and f"{row.first_generate_s:.1f}",
    "recompiled": lambda row: None if row.recompiled is None else str(row.recompiled),
    "kernels": lambda row: row.kernels and str(row.kernels),
    "same tokens": lambda row: "yes" if row.repeatable else "NO",
    "peak GB": lambda row: row.peak_bytes and f"{row.peak_bytes / 1e9:.1f}",
}


def table(rows: list[SpeedRow], title: str) -> Table:
    """A row for each sparsity; columns of which nothing was measured are left out."""
    made = Table(title=title)
    shown = {heading: show for heading, show in _COLUMNS.items() if any(map(show, rows))}
    for heading in shown:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*[show(row) or "" for show in shown.values()])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="llama-3-8b on a GPU, llama-3.2-1b on a CPU")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--vocabulary", type=int, help="another vocabulary than the model has")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.75])
    parser.add_argument("--prompt", type=int, help="128 on a GPU, 16 on a CPU")
    parser.add_argument("--long-prompt", type=int, help="the prompt that is timed; 2048 on a GPU, 128 on a CPU")
    parser.add_argument("--tokens", type=int, help="decoded per repetition; 64 on a GPU, 32 on a CPU")
    parser.add_argument("--cache", choices=["static", "dynamic"], help="static on a GPU, dynamic on a CPU")
    parser.add_argument("--skip-dense", action="store_true", help="time the sparse model only")
    parser.add_argument("--lowering", choices=["inductor", "eager"], help="of the sparse model, as for sparsify")
    parser.add_argument("--weights", help="quantise the sparse model: int8 or int4, with an int8 head")
    parser.add_argument("--head", help="format of the sparse model's head: int8, int4 or none")
    parser.add_argument("--head-sparsity", type=float, help="of the head's inputs, which are all kept by default")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()

    start = time.perf_counter()

    def progress(done: int, of: int) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {done} of {of} runs", file=sys.stderr, flush=True)

    device = arguments.device
    shape = arguments.shape or ("llama-3-8b" if device == "cuda" else "llama-3.2-1b")
    asked = {"num_hidden_layers": arguments.blocks, "vocab_size": arguments.vocabulary}
    changes = {name: each for name, each in asked.items() if each}
    machine = bandwidth(device)
    model = random_model(config(shape, **changes), dtype=torch.bfloat16, device=device)
    weights = arguments.weights
    if arguments.head:
        weights = {**({"*": weights} if weights else {}), **dict.fromkeys(head_linears(model), arguments.head)}
    rows = decode_speed(
        model,
        arguments.targets,
        prompt=arguments.prompt,
        long_prompt=arguments.long_prompt,
        tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        cache=arguments.cache,
        with_dense=not arguments.skip_dense,
        weights=weights,
        head=arguments.head_sparsity,
        lowering=arguments.lowering,
        progress=progress,
    )
    how = {"weights": arguments.weights, "head": arguments.head, "head_sparsity": arguments.head_sparsity}
    common = describe(device) | machine | {"shape": shape, "dtype": "bf16", **how, **changes}
    for row in rows:
        sys.stdout.write(json.dumps(common | asdict(row)) + "\n")
    head = f"head {arguments.head or 'as it is'}, sparsity {arguments.head_sparsity or 0:.0%}"
    title = (
        f"{shape}, {arguments.weights or 'bf16'}, {head}, batch 1, {common['device']}, "
        f"reads {machine['read_GB/s']} GB/s; prompt of {rows[0].prompt_tokens} tokens"
    )
    Console(width=180).print(table(rows, title))


if __name__ == "__main__":
    main()

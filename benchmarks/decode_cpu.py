"""Decode speed on a CPU through `generate()`: Llama-3.2-1B shapes, random weights, dense against sparse.

    python benchmarks/decode_cpu.py                     # 16 blocks, vocabulary 128256: about 6 GB and 5 minutes
    python benchmarks/decode_cpu.py --blocks 4 --vocabulary 32000

Prints one JSON line per row (device, versions, commit, ms per token, ratio, bytes per token) and then a table.
"""

import argparse
import json
import sys

from environment import bandwidth, describe
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig

from was_fx.measure.speed import SpeedRow, decode_speed


def shapes(blocks: int, vocabulary: int) -> LlamaConfig:
    """Llama-3.2-1B, with as many blocks and as large a head as asked for."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.75])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()

    machine = bandwidth()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=None)
        rows = decode_speed(
            shapes(arguments.blocks, arguments.vocabulary),
            arguments.targets,
            tokens=arguments.tokens,
            repetitions=arguments.repetitions,
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    common = {**describe(), **machine, "blocks": arguments.blocks, "vocabulary": arguments.vocabulary, "dtype": "bf16"}
    for row in rows:
        sys.stdout.write(json.dumps(common | _measured(row)) + "\n")
    Console().print(_table(rows, machine))


def _measured(row: SpeedRow) -> dict[str, float | int | list[float]]:
    return {
        "nominal": round(row.target, 4),
        "realised": round(row.realised, 4),
        "ms_per_token": round(row.ms_per_token, 2),
        "ms_of_each_repetition": [round(ms, 2) for ms in row.repetitions],
        "ratio": round(row.ratio, 3),
        "bytes_per_token": row.bytes_per_token,
        "GB/s": round(row.bytes_per_token / row.ms_per_token / 1e6, 1),
    }


def _table(rows: list[SpeedRow], machine: dict[str, float]) -> Table:
    table = Table(
        title=f"decode, batch 1; the machine copies {machine['copy_GB/s']} and reads {machine['read_GB/s']} GB/s"
    )
    for heading in ("sparsity", "realised", "ms/token", "ratio", "GB read/token", "GB/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.target:.0%}" if row.target else "dense",
            f"{row.realised:.1%}" if row.target else "",
            f"{row.ms_per_token:.1f}",
            f"{row.ratio:.2f}×",
            f"{row.bytes_per_token / 1e9:.3f}",
            f"{row.bytes_per_token / row.ms_per_token / 1e6:.1f}",
        )
    return table


if __name__ == "__main__":
    main()

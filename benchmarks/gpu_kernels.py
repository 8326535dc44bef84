"""Time of the decode kernels of one block on a GPU, beside cuBLAS and the floor.

    python benchmarks/gpu_kernels.py                       # Llama-3-8B shapes, bf16
    python benchmarks/gpu_kernels.py --shape qwen2.5-7b

Weights take turns, so that none is read from the L2 cache; all times are CUDA-graph replays, medians. Listing the kept
channels counts at its true cost: what norms, attention and the gated product take longer when they also add the parts
of the product before them and list their output. Prints one JSON line per shape and sparsity, and then a table.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from environment import describe
from rich.console import Console
from rich.table import Table

from was_fx.kernels.ops import decode_attention, gated_product_compact, rms_norm_compact
from was_fx.kernels.parts.arrivals import arrivals
from was_fx.kernels.parts.gemv_config import LinearsShape, gemv_config
from was_fx.kernels.tune.graph_timing import capture, microseconds
from was_fx.kernels.tune.tile_sizes import ROTATED_BYTES, measure
from was_fx.measure.shapes import SHAPES, config

SPARSITIES = (0.0, 0.4, 0.5, 0.6, 0.75)
CALLS = 20


def products(c: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """K and the N of each product of a block, by the model's configuration."""
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads, shared = c.num_attention_heads * width, c.num_key_value_heads * width
    return {
        "qkv": (c.hidden_size, (heads, shared, shared)),
        "o": (heads, (c.hidden_size,)),
        "gate_up": (c.hidden_size, (c.intermediate_size, c.intermediate_size)),
        "down": (c.intermediate_size, (c.hidden_size,)),
    }


def dense(channels: int, outputs: int, dtype: torch.dtype) -> float:
    """Microseconds of cuBLAS for one token and W [N, K]."""
    copies = max(2, min(16, -(-ROTATED_BYTES // (channels * outputs * dtype.itemsize))))
    weights = [torch.randn(outputs, channels, device="cuda").to(dtype) for _ in range(copies)]
    x = torch.randn(1, channels, device="cuda").to(dtype)
    return microseconds([capture([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])], copies)[0]


def listing(shape: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Microseconds of what feeds each product: alone, and with the parts before it added and its output listed."""
    c = config(shape)
    parts = products(c)
    splits = {name: gemv_config(torch.device("cuda"), dtype, k, n).splits for name, (k, n) in parts.items()}

    def rand(*sizes: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda").to(like)

    hidden, wide = c.hidden_size, c.intermediate_size
    h, weight = rand(1, hidden), rand(hidden)
    before = {"qkv": "down", "gate_up": "o"}

    def norm(name: str, lists: bool):
        partial = rand(splits[before[name]], 1, hidden, like=torch.float32) if lists else None
        thresholds = [torch.rand(hidden, device="cuda") for _ in parts[name][1]] if lists else []
        return lambda: rms_norm_compact.rms_norm_compact(h, partial, None, weight, thresholds, 1e-5, "cast_first")

    heads, shared = c.num_attention_heads, c.num_key_value_heads
    width = parts["o"][0] // heads
    q, k, v = rand(1, heads, 1, width), rand(1, shared, 256, width), rand(1, shared, 256, width)
    mask = (torch.arange(256, device="cuda") < 192)[None, None, None]

    def attention(lists: bool):
        thresholds = [torch.rand(heads * width, device="cuda") * 0.1] if lists else []
        counters = arrivals(q)
        return lambda: decode_attention.decode_attention(q, k, v, mask, width**-0.5, thresholds, counters)

    partial = rand(splits["gate_up"], 1, 2 * wide, like=torch.float32)
    gate, up, threshold = rand(1, wide), rand(1, wide), torch.rand(wide, device="cuda")
    product = torch.compile(lambda a, b: torch.nn.functional.silu(a) * b)
    gated = gated_product_compact.gated_product_compact
    pairs = {
        "qkv": (norm("qkv", False), norm("qkv", True)),
        "o": (attention(False), attention(True)),
        "gate_up": (norm("gate_up", False), norm("gate_up", True)),
        "down": (
            lambda: product(gate, up),
            lambda: gated(partial, [0, wide], [None, None], threshold, "silu", dtype),
        ),
    }
    return {
        name: tuple(microseconds([capture([call] * CALLS) for call in pair], CALLS)) for name, pair in pairs.items()
    }  # type: ignore[return-value]


def read_bandwidth() -> float:
    """Bytes per second of a sum over 4 GB in bf16."""
    data = torch.ones(2 << 30, dtype=torch.bfloat16, device="cuda")
    seconds = statistics.median(microseconds([capture([data.sum])], 1)) / 1e6
    return data.nbytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    arguments = parser.parse_args()
    dtype = torch.bfloat16
    common = describe("cuda") | {"shape": arguments.shape, "dtype": "bf16"}
    bandwidth = read_bandwidth()
    feeds = listing(arguments.shape, dtype)
    table = Table(title=f"{arguments.shape}, one block, µs; {common['device']} reads {bandwidth / 1e12:.2f} TB/s")
    for heading in ("product", "cuBLAS", *(f"{sparsity:.0%}" for sparsity in SPARSITIES), "listing"):
        table.add_column(heading, justify="right")
    totals = dict.fromkeys(SPARSITIES, 0.0)
    dense_total = listing_total = 0.0
    for name, (channels, sizes) in products(config(arguments.shape)).items():
        best = gemv_config(torch.device("cuda"), dtype, channels, sizes)
        reference = dense(channels, sum(sizes), dtype)
        plain, listed = feeds[name]
        dense_total, listing_total = dense_total + reference, listing_total + listed - plain
        cells = []
        for sparsity in SPARSITIES:
            us = measure(LinearsShape(channels, sizes, dtype), [best], sparsity, 15)[0]
            totals[sparsity] += us
            read = channels * sum(sizes) * dtype.itemsize * (1 - sparsity)
            row = {"product": name, "k": channels, "n": sum(sizes), "sizes": sizes, "sparsity": sparsity, "us": us,
                   "listing_us": listed - plain, "dense_us": reference, "GB/s": read / us / 1e3,
                   "share_of_floor": read / bandwidth * 1e6 / us, "config": vars(best)}  # fmt: skip
            sys.stdout.write(json.dumps(common | row) + "\n")
            cells.append(f"{us:.1f} ({row['share_of_floor']:.0%})")
        table.add_row(name, f"{reference:.1f}", *cells, f"{listed - plain:+.1f}")
    sums = [f"{total + listing_total:.1f}" for total in totals.values()]
    table.add_row("sum with listing", f"{dense_total:.1f}", *sums, f"{listing_total:+.1f}", style="bold")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

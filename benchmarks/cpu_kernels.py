"""Sparse and dense products of Linears on this CPU, by each kind of C++ kernel that it can run, beside torch's.

    python benchmarks/cpu_kernels.py                                  # bf16, every kind, about 5 minutes
    python benchmarks/cpu_kernels.py --dtype float32 --kinds avx2 --tokens 1 8 32

Milliseconds are medians over calls that rotate through more weights than the caches hold, all functions taking turns:

    gather s      x drops a share s of its channels; rows of Wᵀ contiguous
    columns       dense product, rows of Wᵀ contiguous          torch columns    torch's on the same weight
    rows          dense product, rows of W contiguous           torch rows       torch's on the same weight, the usual

Prints a JSON line for each shape and number of tokens, with GB/s of one token's gather, and then a table.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from environment import bandwidth, describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from was_fx.kernels.cpu import library
from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather, cpu_product

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (576, 1536), (1536, 576))  # K, N
ROTATED_BYTES = 256 << 20
SPARSITIES = (0.0, 0.5, 0.75)

Function = Callable[[Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = library.KINDS[: library.library().was_processor() + 1]
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-slow", action="store_true", help="leave out what torch has no instructions for")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = describe() | bandwidth() | {"dtype": arguments.dtype}
    rows = []
    for (k, n), tokens in itertools.product(SHAPES, arguments.tokens):
        x = torch.randn(tokens, k).to(getattr(torch, arguments.dtype))
        size = k * n * x.element_size()
        weights = [torch.randn(k, n).to(x.dtype).t() for _ in range(ROTATED_BYTES // size + 1)]
        ms = medians(functions(x, arguments.kinds, arguments.skip_slow), weights, 5 if tokens > 256 else 11)
        row = common | {"K": k, "N": n, "tokens": tokens, "ms": ms}
        if tokens == 1:
            row["gather_GB/s"] = {
                name: round(size * (1 - float(name.split()[1])) / time / 1e6, 1)
                for name, time in ms.items()
                if name.startswith("gather")
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    table = Table(title=f"{common['device']}, {arguments.threads} threads, {arguments.dtype}, ms")
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    for heading in ("K → N", "tokens", *names):
        table.add_column(heading, justify="right")
    for row in rows:
        shown = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "" for name in names]
        table.add_row(f"{row['K']} → {row['N']}", str(row["tokens"]), *shown)
    Console(width=None if sys.stdout.isatty() else 300).print(table)


def functions(x: Tensor, kinds: list[str], skip_slow: bool) -> dict[str, Function]:
    """What is timed, by name, of input-major weights [N, K]; the other layout takes the same numbers for another W."""
    found: dict[str, Function] = {}
    tokens, channels = x.shape
    for kind in kinds:
        if tokens <= 8:
            for share in SPARSITIES:
                t = torch.full((channels,), torch.quantile(x.float().abs(), share).item() if share else -1.0)
                found[f"gather {share} {kind}"] = with_kind(
                    kind, lambda weight, t=t: cpu_gather.sparse_linear(x, [weight], [None], [t])
                )
            found[f"rows {kind}"] = with_kind(kind, lambda weight: cpu_product.by_rows(x, _row_major(weight), None))
        if tokens > 1:
            found[f"columns {kind}"] = with_kind(kind, lambda weight: cpu_product.by_columns(x, weight, None))
    if tokens == 1 and x.dtype != torch.float16:
        t = torch.full((channels,), torch.quantile(x.float().abs(), 0.5).item())
        found["embedding_bag 0.5"] = lambda weight: cpu_embedding_bag.sparse_linear(x, [weight], [None], [t])
    found["torch rows"] = lambda weight: torch.nn.functional.linear(x, _row_major(weight))
    if not skip_slow:
        found["torch columns"] = lambda weight: torch.nn.functional.linear(x, weight)
    return found


def _row_major(weight: Tensor) -> Tensor:
    return weight.t().view(weight.shape)


def with_kind(kind: str, function: Function) -> Function:
    """The function by kernels of this kind."""

    def run(weight: Tensor) -> object:
        os.environ[library.LIMIT] = kind
        library.kind.cache_clear()
        return function(weight)

    return run


def medians(timed: dict[str, Function], weights: list[Tensor], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each function. They take turns, and each call has the weight unused for longest."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    unused = itertools.cycle(weights)
    for turn in range(repetitions + 1):
        for name, function in timed.items():
            weight = next(unused)
            start = time.perf_counter()
            function(weight)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


if __name__ == "__main__":
    main()

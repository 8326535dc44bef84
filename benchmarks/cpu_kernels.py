"""Sparse Linear on this CPU: the C++ gather, embedding_bag and the dense product; up to how many tokens each gather
pays; and over how many bags embedding_bag should split a token.

    python benchmarks/cpu_kernels.py

Every time is the median over calls that rotate through more weights than the caches hold, dense and sparse taking
turns. Prints JSON lines.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from environment import describe
from torch import Tensor

from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather
from was_fx.kernels.linear.sparse_linear import reference

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))  # K, N
ROTATED_BYTES = 256 << 20
REPETITIONS = 15


def interleaved_ms(functions: dict[str, Callable[[Tensor], object]], weights: list[Tensor]) -> dict[str, float]:
    """Median milliseconds of each function. They take turns, and each call has the weight unused for longest."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    unused = itertools.cycle(weights)
    for turn in range(REPETITIONS + 1):
        for name, function in functions.items():
            weight = next(unused)
            start = time.perf_counter()
            function(weight)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def problem(k: int, n: int, tokens: int, sparsity: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x [tokens, K], t [K] that drops a share of its channels, and weights [N, K] in input-major storage."""
    x = torch.randn(tokens, k).to(dtype)
    threshold = torch.full((k,), torch.quantile(x.float().abs(), sparsity).item())
    size = k * n * x.element_size()
    weights = [torch.randn(k, n).to(dtype).t() for _ in range(ROTATED_BYTES // size + 1)]
    return x, threshold, weights


def bags(dtype: torch.dtype) -> None:
    for (k, n), sparsity in itertools.product(SHAPES, (0.5, 0.75)):
        x, threshold, weights = problem(k, n, 1, sparsity, dtype)

        def run(weight: Tensor, per_thread: int, x: Tensor = x, threshold: Tensor = threshold) -> Tensor:
            cpu_embedding_bag.BAGS_PER_THREAD = per_thread
            return cpu_embedding_bag.sparse_linear(x, [weight], [None], [threshold])

        functions = {str(b): (lambda weight, b=b, run=run: run(weight, b)) for b in (1, 2, 4, 8)}
        report("bags per thread", dtype, k, n, sparsity, interleaved_ms(functions, weights))


def tokens(dtype: torch.dtype) -> None:
    for (k, n), sparsity, count in itertools.product(SHAPES, (0.5, 0.75), (1, 2, 4, 8, 12)):
        x, threshold, weights = problem(k, n, count, sparsity, dtype)
        row_major = {weight.data_ptr(): weight.contiguous() for weight in weights}
        functions = {
            "gather": lambda weight, x=x, t=threshold: cpu_gather.sparse_linear(x, [weight], [None], [t]),
            "embedding_bag": lambda weight, x=x, t=threshold: cpu_embedding_bag.sparse_linear(x, [weight], [None], [t]),
            "dense product": lambda weight, x=x, t=threshold: reference(x, [weight], [None], [t]),
            "dense Linear": lambda weight, x=x, rows=row_major: torch.nn.functional.linear(x, rows[weight.data_ptr()]),
        }
        report(f"{count} tokens", dtype, k, n, sparsity, interleaved_ms(functions, weights))


def report(what: str, dtype: torch.dtype, k: int, n: int, sparsity: float, ms: dict[str, float]) -> None:
    row = describe() | {"what": what, "dtype": str(dtype), "K": k, "N": n, "sparsity": sparsity, "ms": ms}
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for each in (torch.bfloat16, torch.float32):
        bags(each)
        tokens(each)

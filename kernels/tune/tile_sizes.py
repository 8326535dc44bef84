"""Measure which tile sizes of `gather_gemv` are fastest for a shape on this GPU."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import gather_gemv
from was_fx.kernels.ops.compact import reference as compaction
from was_fx.kernels.parts.gemv_config import GemvConfig
from was_fx.kernels.tune.graph_timing import capture, microseconds

Shape = tuple[int, tuple[int, ...], torch.dtype]

SPARSITIES = (0.4, 0.5, 0.6, 0.75)

# Weights that calls take turns with, so that none is read from the L2 cache.
ROTATED_BYTES = 256 << 20

# What each further split costs the kernel that adds the parts, per 4096 output channels: measured for RMSNorm, whose
# programs each read all of them. Products that several programs read (gate and up) cost less.
MICROSECONDS_PER_SPLIT = 0.2

# Candidates timed together, in turns.
BATCH = 16


def candidates(channels: int, sizes: Sequence[int], multiprocessors: int) -> list[GemvConfig]:
    """Configurations worth measuring for Linears [N_g, K], on a GPU with so many multiprocessors."""
    found = []
    for rows, columns in itertools.product((64, 128, 256), (32, 64, 128)):  # with 8 warps none was faster
        if not 4096 <= rows * columns <= 16384 or columns > 2 * triton.next_power_of_2(max(sizes)):
            continue
        tiles = sum(triton.cdiv(n, columns) for n in sizes)
        for programs in (1, 2, 3, 4):
            splits = max(1, round(programs * multiprocessors / tiles))
            if splits <= 16 and splits * 32 <= max(channels, 32):
                found.append(GemvConfig(rows, columns, splits, 4))
    return list(dict.fromkeys(found))


def _run(case: tuple[Any, ...], config: GemvConfig) -> Tensor:
    x, index, count, weights, thresholds = case
    return gather_gemv(x, index, count, weights, thresholds, config.splits, config)


@torch.no_grad()
def measure(shape: Shape, configs: Sequence[GemvConfig], sparsity: float, repetitions: int) -> list[float]:
    """Microseconds of each configuration at one sparsity, median of so many graph replays."""
    channels, sizes, dtype = shape
    size = channels * sum(sizes) * dtype.itemsize
    copies = max(2, min(16, -(-ROTATED_BYTES // size)))
    generator = torch.Generator("cuda").manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    for _ in range(copies):
        x = torch.randn(1, channels, device="cuda", generator=generator).to(dtype)
        threshold = x.float().abs().flatten().kthvalue(max(1, round(sparsity * channels))).values.expand(channels)
        thresholds = [threshold.contiguous() if sparsity else torch.full_like(threshold, -1.0)] * len(sizes)
        weights = [torch.randn(channels, n, device="cuda", generator=generator).to(dtype).t() for n in sizes]
        index, count = compaction(x, thresholds, triton.next_power_of_2(channels))
        cases.append((x, index, count, weights, thresholds))
    times: list[float] = []
    for first in range(0, len(configs), BATCH):
        graphs = [capture([partial(_run, case, config) for case in cases]) for config in configs[first : first + BATCH]]
        times += microseconds(graphs, copies, repetitions)
    return times


def tune_shape(shape: Shape, sparsities: Sequence[float] = SPARSITIES) -> tuple[GemvConfig, dict[str, float]]:
    """The fastest configuration over several sparsities, and its microseconds at each.

    All candidates are timed at the middle one, the best dozen of them at every one.
    """
    channels, sizes, _ = shape
    configs = candidates(channels, sizes, torch.cuda.get_device_properties("cuda").multi_processor_count)

    def reading(config: GemvConfig) -> float:
        return MICROSECONDS_PER_SPLIT * config.splits * sizes[0] / 4096 if len(sizes) == 1 else 0.0

    middle = sorted(sparsities)[len(sparsities) // 2]
    first = measure(shape, configs, middle, 3)
    ranked = sorted(zip(first, configs, strict=True), key=lambda pair: pair[0] + reading(pair[1]))
    best = [config for _, config in ranked[:12]]
    times = {each: measure(shape, best, each, 9) for each in sparsities}
    totals = [sum(times[each][i] for each in sparsities) + len(sparsities) * reading(c) for i, c in enumerate(best)]
    winner = totals.index(min(totals))
    return best[winner], {f"{each:g}": round(times[each][winner], 2) for each in sparsities}

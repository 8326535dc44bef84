"""Measure which tile sizes of `gather_gemv` are fastest for a shape on this GPU."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from was_fx.kernels.linear.gather_gemv import gather_gemv
from was_fx.kernels.ops.compact import reference as compact
from was_fx.kernels.parts.gemv_config import GemvConfig, device_file, shape_key, tuned, user_folder
from was_fx.kernels.tune.graph_timing import capture, microseconds

Shape = tuple[int, tuple[int, ...], torch.dtype]
Progress = Callable[[int, int], None]

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
        index, count = compact(x, thresholds, triton.next_power_of_2(channels))
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


def tune(
    shapes: Sequence[Shape], *, again: bool = False, folder: Path | None = None, progress: Progress | None = None
) -> Path:
    """Measure shapes and keep the best configuration of each in the user's file for this GPU.

    The file is written after every shape, so an interrupted run goes on where it stopped.

    Args:
        shapes: (K, (N_1, …), dtype) each.
        again: measure shapes anew that the file holds already.
        folder: of the file; the user's by default.
        progress: called with (shapes done, all shapes).

    Returns:
        The file.

    Raises:
        ValueError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; tile sizes are tuned on the GPU that will use them")
    path = (folder or user_folder()) / device_file("cuda")
    content = json.loads(path.read_text()) if path.is_file() else {"configurations": {}, "microseconds": {}}
    for done, shape in enumerate(shapes):
        if progress is not None:
            progress(done, len(shapes))
        key = shape_key(*shape)
        if key in content["configurations"] and not again:
            continue
        config, times = tune_shape(shape)
        content["device"] = torch.cuda.get_device_name()
        content["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
        content["configurations"][key] = vars(config)
        content["microseconds"][key] = times
        _write(path, content)
        torch.cuda.empty_cache()
    if progress is not None:
        progress(len(shapes), len(shapes))
    tuned.cache_clear()
    return path


def _write(path: Path, content: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)

"""What every benchmark row carries: device, versions, commit, and the machine's own bandwidth."""

import statistics
import subprocess
import time
from pathlib import Path

import torch

from was_fx.measure.machine import environment


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Device, versions and commit."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {**environment(device), "commit": commit.stdout.strip() or "unknown"}


def bandwidth(device: str = "cpu", size: int = 512 << 20) -> dict[str, float]:
    """GB/s of a copy (bytes read plus bytes written) and of a sum (bytes read), medians of 7."""
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    read = median_seconds(source.sum, device)
    return {"copy_GB/s": round(2 * size / copy / 1e9, 1), "read_GB/s": round(size / read / 1e9, 1)}


def median_seconds(function, device: str = "cpu", repetitions: int = 7) -> float:
    """Median time of one call, after one that does not count."""
    times = []
    for _ in range(repetitions + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

"""How long a decode step will take on a GPU, predicted from whole steps that were measured there.

A step costs so much for itself, for each block (launches, norms, attention, lists of channels) and for each byte of
weights that it reads. These numbers are fitted to `measured/decode_steps.json`, for each GPU and format of weights.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from scipy.optimize import nnls

# Bytes of a weight, with its share of scales.
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 4.5 / 8}


@dataclass(frozen=True)
class Prediction:
    """A decode step on a GPU.

    Attributes:
        gpu: its name.
        weights: format of the weights: "bf16", "int8" or "int4".
        ms: of the sparse step.
        dense_ms: of what transformers compiles for the dense bf16 model; None if too little was measured there.
        measured: how many measured steps `ms` comes from.
        models: the shapes that they were measured with.
        miss: the largest relative difference between these steps and what would be predicted for them.
    """

    gpu: str
    weights: str
    ms: float
    dense_ms: float | None
    measured: int
    models: tuple[str, ...]
    miss: float


def known_gpus() -> tuple[str, ...]:
    """The GPUs that steps were measured on."""
    return tuple(sorted({str(step["gpu"]) for step in _steps()}))


def find_gpu(name: str) -> str:
    """The known GPU that a name such as "h200" means.

    Raises:
        ValueError: nothing was measured on such a one; names the known ones.
    """
    found = [gpu for gpu in known_gpus() if name.strip().lower() in (gpu.lower(), gpu.lower().split()[-1])]
    if not found:
        raise ValueError(f"nothing was measured on {name!r}; known are {', '.join(known_gpus())}")
    return found[0]


def read_range(gpu: str, weights: str) -> tuple[float, float]:
    """From how few to how many bytes of weights a step may read to be predicted: not far beyond the measured ones."""
    read = [1e9 * step["read_gb"] for step in _steps_of(gpu, weights, sparse=True)]
    return 0.5 * min(read), 1.5 * max(read)


def predict(gpu: str, weights: str, blocks: int, read: float, dense_read: float) -> Prediction:
    """Predict a decode step.

    Args:
        gpu: one of `known_gpus`.
        weights: one of `BYTES`.
        blocks: of the model.
        read: bytes of weights that a sparse step reads.
        dense_read: bytes that a dense one in bf16 reads.
    """
    steps = _steps_of(gpu, weights, sparse=True)
    dense = _steps_of(gpu, "bf16", sparse=False)
    own, *expected = _fitted(steps, [(blocks, read / 1e9), *((step["blocks"], step["read_gb"]) for step in steps)])
    return Prediction(
        gpu=gpu,
        weights=weights,
        ms=own,
        dense_ms=_fitted(dense, [(blocks, dense_read / 1e9)])[0] if len(dense) > 1 else None,
        measured=len(steps),
        models=tuple(dict.fromkeys(step["model"] for step in steps)),
        miss=max(abs(ms / step["ms"] - 1) for ms, step in zip(expected, steps, strict=True)),
    )


def _fitted(steps: list[dict[str, Any]], wanted: list[tuple[int, float]]) -> list[float]:
    """ms of steps of (blocks, GB), by least squares of the relative errors of the measured ones; no cost is negative.

    Few steps are those of one or two models, which can't tell what a step costs for itself.
    """
    constant = float(len(steps) > 3)
    rows = np.array([[step["blocks"], step["read_gb"], constant] for step in steps], dtype=np.float64)
    took = np.array([step["ms"] for step in steps], dtype=np.float64)
    cost, _ = nnls(rows / took[:, None], np.ones(len(took)))
    return [float(np.dot([blocks, read, constant], cost)) for blocks, read in wanted]


def _steps_of(gpu: str, weights: str, *, sparse: bool) -> list[dict[str, Any]]:
    wanted = (gpu, weights, sparse)
    return [step for step in _steps() if (step["gpu"], step["weights"], step["sparse"]) == wanted]


@functools.cache
def _steps() -> list[dict[str, Any]]:
    path = resources.files("was_fx.schedules") / "measured" / "decode_steps.json"
    return json.loads(path.read_text(encoding="utf-8"))["steps"]

"""Tile sizes of the GPU kernels, measured for the shapes of models and kept in the user's file for this GPU."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from was_fx.kernels.parts.gemv_config import Shape, device_file, tuned, user_folder
from was_fx.kernels.tune.tile_sizes import tune_shape
from was_fx.schedules.files.atomic import write_atomically
from was_fx.schedules.progress import Progress, report


def tune(shapes: Sequence[Shape], *, again: bool = False, progress: Progress | None = None) -> Path:
    """Measure shapes and keep the best configuration of each in the user's file for this GPU.

    The file is written after every shape, so an interrupted run goes on where it stopped.

    Args:
        shapes: of Linears and of chosen experts.
        again: measure shapes anew that the file holds already.
        progress: called with (shapes done, all shapes).

    Returns:
        The file.

    Raises:
        ValueError: there is no CUDA device, or the file is damaged.
        OSError: the file can't be written.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; tile sizes are tuned on the GPU that will use them")
    path = user_folder() / device_file("cuda")
    content = json.loads(path.read_text()) if path.is_file() else {"configurations": {}, "microseconds": {}}
    for done, shape in enumerate(shapes):
        report(progress, done, len(shapes))
        key = shape.key
        if key in content["configurations"] and not again:
            continue
        config, times = tune_shape(shape)
        content["device"] = torch.cuda.get_device_name()
        content["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
        content["configurations"][key] = vars(config)
        content["microseconds"][key] = times
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        torch.cuda.empty_cache()
    report(progress, len(shapes), len(shapes))
    tuned.cache_clear()
    return path

"""Tile sizes of `gather_gemv` and `gather_quantized_gemv`: measured ones, kept in JSON, and a rule for all others.

The file of a device maps "K,N1+N2+…,dtype" to a configuration, where the format of quantised weights stands for their
dtype. The user's own files, which `was tune` writes, come before those that are shipped. The number of splits is part
of a compiled graph; the sparsity is not, so one configuration serves all.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from was_fx.kernels.parts.user_cache import user_cache

SHIPPED = Path(__file__).parent / "tuned"

# Multiprocessors; GPUs that tile sizes were measured on have 132.
_USUAL = 128

# Of weights: a dtype, or "int8" or "int4".
Format = torch.dtype | str


class LinearsShape(NamedTuple):
    """G Linears [N_g, K] that share an input.

    Attributes:
        channels: K.
        sizes: N_g of each.
        format: of the weights.
    """

    channels: int
    sizes: tuple[int, ...]
    format: Format

    @property
    def key(self) -> str:
        """The key in a file, such as "4096,4096+1024+1024,bfloat16" or "4096,4096,int8"."""
        return f"{self.channels},{'+'.join(map(str, self.sizes))},{str(self.format).removeprefix('torch.')}"


class ExpertsShape(NamedTuple):
    """Chosen experts [N, K], each of which multiplies a row of its own.

    Attributes:
        channels: K.
        outputs: N.
        pairs: of a row and an expert.
        format: of the weights.
    """

    channels: int
    outputs: int
    pairs: int
    format: Format

    @property
    def sizes(self) -> tuple[int, ...]:
        """N of each pair."""
        return (self.outputs,) * self.pairs

    @property
    def key(self) -> str:
        """The key in a file, such as "2048,8*1536,bfloat16"."""
        return f"{self.channels},{self.pairs}*{self.outputs},{str(self.format).removeprefix('torch.')}"


Shape = LinearsShape | ExpertsShape

# Every shape that was asked for: those that `was tune` measures for a model.
REQUESTED: set[Shape] = set()


@dataclass(frozen=True)
class GemvConfig:
    """Tile sizes of `gather_gemv` or `gather_quantized_gemv`.

    Attributes:
        rows: kept channels per step.
        columns: output channels per program.
        splits: programs that share one tile of output channels.
        warps: of a program.
    """

    rows: int
    columns: int
    splits: int
    warps: int

    def __post_init__(self) -> None:
        for name, item in asdict(self).items():
            if not isinstance(item, int) or item < 1 or (name != "splits" and item & (item - 1)):
                raise ValueError(f"{name} is {item!r}; expected a power of two (splits: any number above 0)")


def device_file(device: torch.device | str) -> str:
    """File name for a device: "nvidia_h200.json"."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"


def user_folder() -> Path:
    """Where `was tune` keeps its files."""
    return user_cache() / "tuned"


def gemv_config(device: torch.device, format: Format, channels: int, sizes: Sequence[int]) -> GemvConfig:
    """The configuration for G Linears [N_g, K] that share an input.

    Args:
        device: of the weights.
        format: of the weights.
        channels: K.
        sizes: N_g of each.
    """
    return _config(device, LinearsShape(channels, tuple(sizes), format))


def experts_config(device: torch.device, format: Format, channels: int, outputs: int, pairs: int) -> GemvConfig:
    """The configuration for chosen experts [N, K], each of which multiplies a row of its own.

    Args:
        device: of the weights.
        format: of the weights.
        channels: K.
        outputs: N.
        pairs: of a row and an expert.
    """
    return _config(device, ExpertsShape(channels, outputs, pairs, format))


def _config(device: torch.device, shape: Shape) -> GemvConfig:
    REQUESTED.add(shape)
    found = tuned(device_file(device)).get(shape.key)
    return found or heuristic(shape.channels, shape.sizes, shape.format, multiprocessors(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for what is none, those of a usual one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _USUAL


@functools.cache
def tuned(name: str) -> dict[str, GemvConfig]:
    """Configurations of the file `name`: the user's where there are any, else the shipped ones.

    Raises:
        ValueError: a file is not what `was tune` writes; names it and what to do.
    """
    merged: dict[str, GemvConfig] = {}
    for folder in (SHIPPED, user_folder()):
        path = folder / name
        if not path.is_file():
            continue
        try:
            entries = json.loads(path.read_text())["configurations"]
            merged |= {key: GemvConfig(**entry) for key, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a tuning file ({error}); delete it, or make it anew with `was tune`"
            ) from None
    return merged


def heuristic(channels: int, sizes: Sequence[int], format: Format, multiprocessors: int = _USUAL) -> GemvConfig:
    """A configuration for a shape, or a GPU, that was not measured: what most measured shapes came out at.

    Tiles of 16 KB, so that many reads are under way, or smaller ones of fewer warps where weights are quantised; about
    three programs of four warps for each multiprocessor, or two; and no part of the list so short that starting costs
    more than reading. Quantised rows are read sooner, so that adding up many parts would cost more than it saves.
    """
    rows, columns, warps = _TILES.get(format, (128, 64, 4))
    tiles = sum(-(-n // columns) for n in sizes)
    each, most = (3, 16) if isinstance(format, torch.dtype) else (2, 8)
    splits = max(1, min(most, round(each * multiprocessors / tiles), channels // 128))
    return GemvConfig(rows=rows, columns=columns, splits=splits, warps=warps)


# Rows, columns and warps; those of 16-bit weights are in `heuristic`.
_TILES: dict[Format, tuple[int, int, int]] = {torch.float32: (64, 64, 4), "int8": (128, 128, 4), "int4": (256, 256, 4)}

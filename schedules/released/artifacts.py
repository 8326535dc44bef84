"""The folder of histograms and greedy tables that TEAL, WAS and WINA release for a model: for each block
`histograms/layer-<block>/{self_attn,mlp}/histograms.pt` and `lookup/layer-<block>/results.csv`."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.released.histograms import ReleasedHistogram, read_histogram
from was_fx.schedules.released.lookup import LookupTable, read_lookup

# Projection: (module that has it, the histogram of its input that TEAL shares among siblings).
_PLACES = {
    **dict.fromkeys(("q", "k", "v", "qkv"), ("self_attn", "h1")),
    "o": ("self_attn", "h2"),
    **dict.fromkeys(("gate", "up", "gate_up"), ("mlp", "h1")),
    "down": ("mlp", "h2"),
}
_REMEDY = "Expected histograms/ and lookup/ with layer-0, layer-1, … for every block of the model: fetch it again."


@dataclass(frozen=True, eq=False)
class Release:
    """What a folder holds.

    Attributes:
        method: `teal` (one histogram of x for siblings), `was` (signed x·‖W‖₁ of each projection) or `wina` (|x|, or
            |x|·‖W‖₂ where WINA weighs it).
        histograms: by block and projection.
        tables: the greedy table of each block.
    """

    method: str
    histograms: Mapping[tuple[int, str], ReleasedHistogram]
    tables: Mapping[int, LookupTable]


def read_release(folder: str | Path, blocks: int) -> Release:
    """Read and check a folder; pickles are loaded with `weights_only=True`.

    Args:
        folder: holds `histograms` and `lookup`.
        blocks: how many blocks the model has; the folder must have the same.

    Raises:
        ScheduleError: with everything that is missing, damaged or not as expected.
    """
    folder = Path(folder)
    problems = _layer_problems(folder, blocks)
    histograms: dict[tuple[int, str], ReleasedHistogram] = {}
    tables: dict[int, LookupTable] = {}
    methods = set()
    for block in range(blocks):
        layer = f"layer-{block}"
        table = _attempt(problems, folder, f"lookup/{layer}/results.csv", _table)
        paths = {module: f"histograms/{layer}/{module}/histograms.pt" for module in ("self_attn", "mlp")}
        contents = {module: _attempt(problems, folder, path, _load) for module, path in paths.items()}
        if table is None or None in contents.values():
            continue
        tables[block] = table
        for projection in table.sparsities[0]:
            module, shared = _PLACES[projection]
            key = shared if shared in contents[module] else projection
            try:
                found = read_histogram(contents[module], key)
            except ValueError as error:
                problems.append(f"{paths[module]}: {error}")
                continue
            histograms[block, projection] = found
            methods.add("teal" if key == shared else "was" if found.signed else "wina")
    if len(methods) > 1 and not problems:
        problems.append(f"its histograms are of several methods: {', '.join(sorted(methods))}")
    if problems:
        headline = f"{folder} cannot be read as a release of TEAL, WAS or WINA"
        raise ScheduleError(headline, list(dict.fromkeys(problems)), _REMEDY)
    return Release(methods.pop(), histograms, tables)


def _layer_problems(folder: Path, blocks: int) -> list[str]:
    """Which of the model's blocks the two sub-folders lack, and which they have beyond them: a line each."""
    problems = []
    expected = [f"layer-{block}" for block in range(blocks)]
    for part in ("histograms", "lookup"):
        found = {path.name for path in (folder / part).glob("layer-*")}
        missing = [name for name in expected if name not in found]
        beyond = sorted(found.difference(expected), key=lambda name: (len(name), name))
        if missing:
            problems.append(f"{part}/ lacks {_listed(missing)} of the model's {blocks} blocks")
        if beyond:
            problems.append(f"{part}/ has {_listed(beyond)}, but the model has only {blocks}")
    return problems


def _listed(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, … {names[-1]} ({len(names)})"


def _attempt(problems: list[str], folder: Path, name: str, read: Callable[[Path], Any]) -> Any:
    """`read(folder / name)`, or None with a line in `problems`; a missing block has its line already."""
    path = folder / name
    try:
        return read(path)
    except FileNotFoundError:
        if (folder / Path(name).parts[0] / Path(name).parts[1]).is_dir():
            problems.append(f"{name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{name}: {error}")
    return None


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"it is no .pt file of plain tensors, or a damaged one ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _table(path: Path) -> LookupTable:
    table = read_lookup(path)
    unknown = [name for name in table.sparsities[0] if name not in _PLACES]
    if unknown:
        raise ValueError(f"unknown columns {', '.join(unknown)}; expected projections among {', '.join(_PLACES)}")
    return table

"""A schedule from what TEAL, WAS or WINA released for a model."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.schedule import LinearSchedule, Schedule, ScheduleMetadata
from was_fx.schedules.names import split_name
from was_fx.schedules.released.artifacts import Release, read_release
from was_fx.schedules.score import Score

# WINA weighs the input of these projections; every other one is scored by |x| alone.
_WINA_WEIGHED = ("k", "gate", "qkv", "gate_up")
# Greedy search may step a small projection to 1 and beyond; a schedule's sparsity is below 1.
_MOST = 0.999


def import_release(
    folder: str | Path,
    levels: float | Sequence[float],
    shapes: Mapping[str, tuple[int, int]],
    *,
    fingerprint: Mapping[str, Any] | None = None,
) -> Schedule:
    """Make a schedule of a released folder: the row of each block's greedy table nearest its level, and the
    threshold of each projection at that row's sparsity from its histogram, as the release's own code does both.

    The method is told from the folder: TEAL's |x|, WAS's |x|·‖W‖₁, or WINA's |x| with ‖W‖₂ for k and gate. A folder
    made for weights that WINA's transformation has rotated fits only a checkpoint that was rotated alike.

    Args:
        folder: holds `histograms/layer-<block>/{self_attn,mlp}/histograms.pt` and `lookup/layer-<block>/results.csv`.
        levels: one level for every block, or one for each block, by the release's own count of parameters. What it
            is by the true one is the schedule's `sparsity`.
        shapes: (N, K) of each Linear of the model's blocks by qualified name, such as
            `model.layers.0.self_attn.q_proj`.
        fingerprint: the model's, if known.

    Returns:
        A `Schedule` whose `target` is the mean level.

    Raises:
        ScheduleError: with everything that is missing or damaged in the folder, does not fit the model, or a level
            that a table does not reach.
    """
    names = projection_names(shapes)
    blocks = 1 + max(block for block, _ in names)
    each = [float(levels)] * blocks if isinstance(levels, (int, float)) else [float(level) for level in levels]
    if len(each) != blocks:
        remedy = "Give one level for all, or one for each block."
        raise ScheduleError(f"there are {len(each)} levels for {blocks} blocks", remedy=remedy)
    release = read_release(folder, blocks)
    problems: list[str] = []
    sparsities = _rows(release, each, problems)
    tokens = _tokens(release, names, shapes, problems)
    if problems:
        remedy = "Give the model that the folder was made for, and levels that its tables reach."
        raise ScheduleError(f"no schedule can be made of {folder}", problems, remedy)
    method = release.method.upper()
    return released_schedule(
        release.method,
        sparsities,
        lambda block, projection, sparsity: release.histograms[block, projection].threshold(sparsity),
        shapes,
        target=sum(each) / blocks,
        source={"method": method, "folder": Path(folder).resolve().name, "levels": each},
        calibration_text=f"histograms by {method}",
        calibration_tokens=tokens,
        fingerprint=fingerprint or {},
    )


def released_schedule(
    method: str,
    sparsities: Mapping[tuple[int, str], float],
    threshold: Callable[[int, str, float], float],
    shapes: Mapping[str, tuple[int, int]],
    **metadata: Any,
) -> Schedule:
    """Put sparsities and thresholds by block and projection on the Linears of a model.

    Args:
        method: `teal`, `was` or `wina`, whose score the thresholds are of; also the schedule's recipe.
        sparsities: by block and projection, as a greedy table has them.
        threshold: τ in score units of (block, projection, sparsity).
        shapes: (N, K) of each Linear of the model's blocks by qualified name.
        metadata: further fields of `ScheduleMetadata`.

    Raises:
        ScheduleError: with every projection that the model lacks, and every Linear without a sparsity.
    """
    names = projection_names(shapes)
    problems = [f"block {b}: the model has no {p}" for b, p in sparsities if (b, p) not in names]
    problems += [f"{name} has no sparsity" for place, name in names.items() if place not in sparsities]
    if problems:
        raise ScheduleError("the release does not fit the model", problems, "Give the model that it was made for.")
    score = Score.named(method)
    linears = {}
    for place, name in names.items():
        weighed = method != "wina" or place[1] in _WINA_WEIGHED
        entry = min(sparsities[place], _MOST), threshold(*place, sparsities[place])
        linears[name] = LinearSchedule(*entry, score.exponent if weighed else 0.0)
    return Schedule(linears, shapes, score.norm, ScheduleMetadata(recipe=method, **metadata))


def _rows(release: Release, levels: Sequence[float], problems: list[str]) -> dict[tuple[int, str], float]:
    """The row of each block's table nearest its level, as sparsities by block and projection."""
    sparsities = {}
    for block, level in enumerate(levels):
        try:
            row = release.tables[block].nearest(level)
        except ValueError as error:
            problems.append(f"block {block}: {error}")
            continue
        sparsities.update({(block, projection): sparsity for projection, sparsity in row.items()})
    return sparsities


def _tokens(
    release: Release,
    names: Mapping[tuple[int, str], str],
    shapes: Mapping[str, tuple[int, int]],
    problems: list[str],
) -> int:
    """How many tokens the histograms count: values / K, which is one number if K is the model's."""
    counted = {
        names[place]: histogram.total / shapes[names[place]][1]
        for place, histogram in release.histograms.items()
        if place in names
    }
    tokens = statistics.median(counted.values()) if counted else 0
    for name, count in counted.items():
        if abs(count - tokens) > 0.01 * tokens:
            problems.append(
                f"{name}: its histogram counts {count:,.0f} tokens of {shapes[name][1]} channels, "
                f"most others {tokens:,.0f}: the model has another number of channels there"
            )
    return round(tokens)


def projection_names(shapes: Mapping[str, object]) -> dict[tuple[int, str], str]:
    """Qualified names by block and the releases' short name: `model.layers.3.mlp.up_proj` is (3, `up`).

    Raises:
        ScheduleError: for a Linear outside the blocks, or two of one place.
    """
    names: dict[tuple[int, str], str] = {}
    problems = [] if shapes else ["there are no Linears"]
    for name in shapes:
        block, projection = split_name(name)
        short = projection.rpartition(".")[2].removesuffix("_proj")
        if block is None:
            problems.append(f"{name} is outside the blocks")
        elif (block, short) in names:
            problems.append(f"{name} and {names[block, short]} are both {short} of block {block}")
        else:
            names[block, short] = name
    if problems:
        raise ScheduleError("released schedules are for models of equal blocks", problems, "Give such a model.")
    return names

"""Two schedules, and what lies between them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from was_fx.cli.render.grid import Cell, draw, short_names
from was_fx.cli.render.tables import change, new_table, percent
from was_fx.schedules.names import visible
from was_fx.schedules.summary import by_depth, by_projection, group_means

if TYPE_CHECKING:
    from was_fx import Schedule

# Fields of the metadata that are shown; the others are long.
_FIELDS = ("recipe", "target", "seed", "calibration_text", "calibration_tokens", "excluded", "weights", "tool_version")


def show_difference(console: Console, a: str, first: "Schedule", b: str, second: "Schedule") -> None:
    """Draw the difference of each Linear, of projections and of runs of blocks, and where the schedules come from."""
    console.print(visible(f"{b} minus {a}: points of sparsity"), style="bold", soft_wrap=True)
    before, after = group_means(first), group_means(second)
    points = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in dict.fromkeys([*before, *after])}
    most = max(map(abs, points.values()))
    cells: dict[str, Cell] = {name: (_signed(value), value) for name, value in points.items()}
    draw(console, cells, lambda text, value: change(text, value, most))
    projections = [{key: each.sparsity for key, each in by_projection(s).items()} for s in (first, second)]
    labels = short_names([*projections[0], *projections[1]])
    _table(console, "projection", [{labels[key]: value for key, value in each.items()} for each in projections], most)
    _table(console, "blocks", depths(first, second), most)
    _table(console, "", [{"all, nominal": first.sparsity}, {"all, nominal": second.sparsity}], most)
    for line in _differences(first, second):
        console.print(visible(line), soft_wrap=True)


def depths(first: "Schedule", second: "Schedule") -> list[dict[str, float]]:
    """Sparsities of both by the same runs of blocks."""
    parts = by_depth(first, other=second), by_depth(second, other=first)
    return [{key: each.sparsity for key, each in side.items()} for side in parts]


def _differences(first: "Schedule", second: "Schedule") -> list[str]:
    """A line for each thing beside sparsities that is not the same."""
    lines = []
    for which, one, other in (("A", first, second), ("B", second, first)):
        only = [name for name in one.linears if name not in other.linears]
        if only:
            lines.append(f"only {which} schedules {len(only)} Linears: {only[0]}{', …' if len(only) > 1 else ''}")
    common = [name for name in first.linears if name in second.linears]
    shapes = sum(first.shapes[name] != second.shapes[name] for name in common)
    if shapes:
        lines.append(f"{shapes} Linears have other shapes: the schedules are for different models")
    same = sum(first.linears[name] == second.linears[name] for name in common)
    lines.append(f"{same} of {len(common)} Linears are the same, thresholds too")
    before, after = dataclasses.asdict(first.metadata), dataclasses.asdict(second.metadata)
    lines += [f"{key}: {_short(before[key])} → {_short(after[key])}" for key in _FIELDS if before[key] != after[key]]
    if first.norm != second.norm:
        lines.append(f"norm: {first.norm} → {second.norm}")
    if before["fingerprint"] != after["fingerprint"]:
        lines.append("model: the fingerprints differ")
    return lines


def _short(value: object) -> str:
    text = "none" if value in (None, "", ()) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _signed(points: float) -> str:
    return f"{100 * points:+.1f}" if abs(points) >= 5e-4 else "0.0"


def _table(console: Console, what: str, sides: Sequence[Mapping[str, float]], most: float) -> None:
    table = new_table(what, "A", "B", "change")
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        shown = [percent(side[key]) if key in side else "–" for side in sides]
        points = sides[1].get(key, 0.0) - sides[0].get(key, 0.0)
        table.add_row(visible(key), *shown, change(f" {_signed(points)} ".rjust(8), points, most))
    console.print(table)

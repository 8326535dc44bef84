"""Where the sparsity of a schedule lies: by projection and by depth."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from was_fx.cli.render.grid import short_names
from was_fx.cli.render.tables import bar, new_table, percent
from was_fx.schedules.names import visible
from was_fx.schedules.summary import Part, by_depth, by_projection, part

if TYPE_CHECKING:
    from was_fx import Schedule

# Cells of a bar, on a narrow terminal and else.
_NARROW, _BAR = 6, 14
# A terminal as wide as this shows both tables side by side.
_WIDE = 140
_MOST = 16


def show_budget(console: Console, schedule: "Schedule") -> None:
    """Draw the budget by projection and by runs of blocks; side by side where there is room."""
    total = part(schedule)
    projections = by_projection(schedule)
    names = short_names(projections)
    shown = dict(sorted(projections.items(), key=lambda item: -item[1].dropped)[:_MOST])
    labelled = {names[key]: projections[key] for key in projections if key in shown}
    tables = [_table("projection" if len(shown) == len(projections) else f"{_MOST} largest", labelled, total, console)]
    if depth := by_depth(schedule):
        tables.append(_table("blocks", {visible(key): each for key, each in depth.items()}, total, console))
    if console.width < _WIDE:
        for table in tables:
            console.print(table)
        return
    page = Table.grid(padding=(0, 6, 0, 0))
    page.add_row(*tables)
    console.print(page)


def _table(what: str, parts: Mapping[str, Part], total: Part, console: Console) -> Table:
    width = _BAR if console.width >= 80 else _NARROW
    table = new_table(what, "sparsity", "", "of all", "of all saved")
    for label, each in parts.items():
        saved = each.dropped / total.dropped if total.dropped else 0.0
        table.add_row(
            label,
            percent(each.sparsity),
            bar(each.sparsity, width),
            percent(each.weights / total.weights),
            percent(saved),
        )
    return table

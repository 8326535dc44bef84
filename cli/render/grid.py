"""A value per Linear, drawn as blocks × projections within the width of the console."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from was_fx.cli.render.tables import heat, shade
from was_fx.schedules.names import by_block, visible

# Text of a cell, and its place on the heat scale (None: no colour).
Cell = tuple[str, float | None]
# Colours the text of a cell by its place on the scale.
Paint = Callable[[str, float], Text]

# Rows from which on a terminal shows blocks in several columns of the page, where they fit.
_LONG = 24
_BETWEEN = 3


def draw(console: Console, cells: Mapping[str, Cell], paint: Paint = heat) -> None:
    """Draw one row per block and one column per projection; Linears outside the blocks follow, one per line.

    A projection that a block doesn't have is left empty. Where the columns don't fit side by side, they are drawn
    in several tables; where there is room for it on a terminal, many blocks are drawn side by side. A terminal without
    colours gets bars beside the numbers.
    """
    rows, others = by_block(cells)
    projections = list(dict.fromkeys(projection for row in rows.values() for projection in row))
    names = short_names(projections)
    width = max((len(text) for text, _ in cells.values()), default=0) + 2
    labels = [prefix for prefix, _ in rows]
    several = len(set(labels)) > 1
    label = {key: visible(f"{key[0]}.{key[1]}" if several else key[1]) for key in rows}
    bars = paint is heat and console.is_terminal and (console.no_color or console.color_system is None)
    first = max([5, *map(len, label.values())]) + 1
    widths = {
        each: 2 + max(len(names[each]), *(len(row[each][0]) for row in rows.values() if each in row))
        for each in projections
    }
    for group in _groups(widths, console.width - first - 3):
        page = first + sum(widths[each] for each in group) + len(group)
        beside = (console.width + _BETWEEN) // (page + _BETWEEN) if console.is_terminal and len(rows) > _LONG else 1
        height = -(-len(rows) // max(1, beside))
        tables = []
        for at in range(0, len(rows), height):
            table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", collapse_padding=True)
            table.add_column("block", justify="right", no_wrap=True)
            for projection in group:
                table.add_column(" " + names[projection] + " ", justify="right", no_wrap=True)
            for key in list(rows)[at : at + height]:
                drawn = [_drawn(rows[key].get(each), widths[each], paint, bars) for each in group]
                table.add_row(label[key] + " ", *drawn)
            tables.append(table)
        console.print(_side_by_side(tables))
    for name, cell in others.items():
        console.print(visible(name), _drawn(cell, width, paint, bars), soft_wrap=True)


def _side_by_side(tables: list[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    page = Table.grid(padding=(0, _BETWEEN, 0, 0))
    for _ in tables:
        page.add_column()
    page.add_row(*tables)
    return page


def short_names(projections: Iterable[str]) -> dict[str, str]:
    """The shortest clear label of each projection, from the names alone, as it is shown.

    A last word that several names share goes (`q_proj`, `k_proj` → `q`, `k`), and a first word that all of them
    share (`c_attn`, `c_fc` → `attn`, `fc`). Where labels would be equal, the parent comes before them
    (`attn.proj`, `mlp.proj`), up to the whole name.
    """
    projections = list(dict.fromkeys(projections))
    lasts = {projection.rpartition(".")[2] for projection in projections}
    ends = Counter(last.rpartition("_")[2] for last in lasts if "_" in last)
    starts = {last.partition("_")[0] if "_" in last else "" for last in lasts}

    def strip(last: str) -> str:
        if len(starts) == 1 and len(lasts) > 1:
            last = last.partition("_")[2] or last
        stem, _, end = last.rpartition("_")
        return stem if stem and ends[end] > 1 else last

    labels = {projection: strip(projection.rpartition(".")[2]) for projection in projections}
    depth = 1
    while len(set(labels.values())) < len(labels):
        counts = Counter(labels.values())
        for projection in projections:
            if counts[labels[projection]] > 1:
                parts = projection.split(".")
                whole = depth >= len(parts)
                labels[projection] = projection if whole else ".".join([*parts[-1 - depth : -1], strip(parts[-1])])
        depth += 1
    return {projection: visible(label) for projection, label in labels.items()}


def block_labels(blocks: Iterable[str]) -> dict[str, str]:
    """`model.layers.3` as `3`, unless there are blocks of several stacks."""
    blocks = list(blocks)
    stacks = {block.rpartition(".")[0] for block in blocks}
    return {block: visible(block.rpartition(".")[2] if len(stacks) == 1 else block) for block in blocks}


def share_labels(what: str, shares: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The labels of all blocks, or of all projections, that several schedules have shares of."""
    keys = dict.fromkeys(key for each in shares for key in each)
    return short_names(keys) if what == "projection" else block_labels(keys)


def _groups(widths: Mapping[str, int], room: int) -> Iterator[list[str]]:
    """Runs of columns that fit `room`."""
    group: list[str] = []
    used = 0
    for projection, width in widths.items():
        if group and used + 1 + width > room:
            yield group
            group, used = [], 0
        group.append(projection)
        used += 1 + width
    if group:
        yield group


def _drawn(cell: Cell | None, width: int, paint: Paint, bars: bool) -> Text:
    if cell is None:
        return Text("· ".rjust(width), style="dim")
    text, share = cell
    if share is None:
        return Text(f"{text} ".rjust(width))
    return paint(f"{text}{shade(share) if bars else ' '}".rjust(width), share)

"""A value per Linear, drawn as blocks × projections within the width of the console."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from was_fx.cli.render.tables import heat
from was_fx.schedules.names import by_block, visible

# Text of a cell, and its place on the heat scale (None: no colour).
Cell = tuple[str, float | None]


def draw(console: Console, cells: Mapping[str, Cell]) -> None:
    """Draw one row per block and one column per projection; Linears outside the blocks follow, one per line.

    A projection that a block doesn't have is left empty. Where the columns don't fit side by side, they are drawn
    in several tables.
    """
    rows, others = by_block(cells)
    projections = list(dict.fromkeys(projection for row in rows.values() for projection in row))
    names = short_names(projections)
    width = max((len(text) for text, _ in cells.values()), default=0) + 2
    labels = [prefix for prefix, _ in rows]
    several = len(set(labels)) > 1
    label = {key: visible(f"{key[0]}.{key[1]}" if several else key[1]) for key in rows}
    room = console.width - max([5, *map(len, label.values())]) - 4
    for group in _groups(projections, names, width, room):
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", collapse_padding=True)
        table.add_column("block", justify="right", no_wrap=True)
        for projection in group:
            table.add_column(" " + names[projection] + " ", justify="right", no_wrap=True)
        for key, row in rows.items():
            drawn = [_drawn(row.get(projection), max(width, len(names[projection]) + 2)) for projection in group]
            table.add_row(label[key] + " ", *drawn)
        console.print(table)
    for name, cell in others.items():
        console.print(visible(name), _drawn(cell, width), soft_wrap=True)


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


def _groups(projections: list[str], names: Mapping[str, str], width: int, room: int) -> Iterator[list[str]]:
    """Runs of columns that fit `room`."""
    group: list[str] = []
    used = 0
    for projection in projections:
        needed = 1 + max(width, len(names[projection]) + 2)
        if group and used + needed > room:
            yield group
            group, used = [], 0
        group.append(projection)
        used += needed
    if group:
        yield group


def _drawn(cell: Cell | None, width: int) -> Text:
    if cell is None:
        return Text("· ".rjust(width), style="dim")
    text, share = cell
    padded = f"{text} ".rjust(width)
    return Text(padded) if share is None else heat(padded, share)

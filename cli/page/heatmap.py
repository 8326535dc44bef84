"""A share for every Linear, drawn as blocks × projections."""

from collections.abc import Mapping
from statistics import fmean

from markupsafe import Markup

from was_fx.cli.page import svg
from was_fx.cli.render.grid import block_labels, short_names
from was_fx.schedules.experts import groups
from was_fx.schedules.names import by_block

_WIDTH, _LEFT = 440, 34
# Blocks up to which cells have their numbers in them.
_NUMBERS = 48
_CHARACTER = 7.0


def heatmap(title: str, shares: Mapping[str, float]) -> Markup:
    """Sparsity of every Linear by qualified name, experts of a parameter by their mean.

    Linears outside the blocks get a row of their own each.
    """
    means = {group: fmean(shares[name] for name in names) for group, names in groups(shares).items()}
    rows, others = by_block(means)
    projections = short_names(projection for row in rows.values() for projection in row)
    paths = {f"{prefix}.{block}": row for (prefix, block), row in rows.items()}
    labels = block_labels(paths)
    height = 16 if len(rows) <= _NUMBERS else 7
    cell = (_WIDTH - _LEFT) / max(len(projections), 1)
    low, high = min(means.values()), max(means.values())
    slanted = any(_CHARACTER * len(name) > cell for name in projections.values())
    top = 60 if slanted else 20
    root = svg.drawing(
        _WIDTH,
        top + height * (len(rows) + len(others)) + 4,
        title,
        f"From {100 * low:.0f} to {100 * high:.0f} % over {len(rows)} blocks and {len(projections)} projections. "
        "The table has the numbers.",
    )
    for column, name in enumerate(projections.values()):
        x = _LEFT + (column + 0.5) * cell
        turn = {"transform": f"rotate(-40 {x:.1f} {top - 6})"} if slanted else {}
        svg.write(root, x, top - 6, name, "head", text_anchor="start" if slanted else "middle", **turn)
    for position, (path, row) in enumerate(paths.items()):
        y = top + position * height
        if height > 10 or position % 8 == 0:
            svg.write(root, _LEFT - 6, y + height / 2 + 4, labels[path], "head", text_anchor="end")
        for column, projection in enumerate(projections):
            if projection in row:
                _cell(root, _LEFT + column * cell, y, cell, height, row[projection], f"{path}.{projection}")
    for position, (name, share) in enumerate(others.items(), start=len(rows)):
        y = top + position * height
        _cell(root, _LEFT, y, cell, height, share, name)
        svg.write(root, _LEFT + cell + 6, y + height / 2 + 4, name, "head")
    return svg.markup(root)


def _cell(root: svg.Element, x: float, y: float, width: float, height: float, share: float, name: str) -> None:
    tip = f"{name}: {100 * share:.1f} %"
    opacity = 0.04 + 0.86 * max(0.0, min(share, 1.0))
    svg.add(root, "rect", "cell", tip, x=x, y=y, width=width - 1, height=height - 1, fill_opacity=opacity)
    if height > 10 and width > 24:
        svg.write(root, x + width / 2, y + height / 2 + 4, f"{100 * share:.0f}", "number", text_anchor="middle")

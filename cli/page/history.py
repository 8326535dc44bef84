"""The trials of searches."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from was_fx.cli.input.compare_inputs import Trials
from was_fx.cli.page import svg

_WIDTH, _HEIGHT = 460, 300


def history(searches: Sequence[Trials]) -> Markup:
    """The loss of every trial, and the best so far."""
    every = [
        (index, loss)
        for each in searches
        for index, loss in zip(each.indices, each.losses, strict=True)
        if math.isfinite(loss)
    ]
    best = "; ".join(f"{each.path.name}: {each.best[1]:.4f} at trial {each.best[0]}" for each in searches)
    root = svg.drawing(_WIDTH, _HEIGHT, "Search history", f"The best of each search: {best}.")
    x = svg.Scale(*svg.padded([index for index, _ in every], 0.02), 52, _WIDTH - 12)
    y = svg.Scale(*svg.padded([loss for _, loss in every]), _HEIGHT - 48, 30)
    svg.axes(root, x, y, "trial", "loss, nats per token")
    for kind, each in enumerate(searches):
        line: list[tuple[float, float]] = []
        so_far = math.inf
        for index, loss in zip(each.indices, each.losses, strict=True):
            if not math.isfinite(loss):
                continue
            if loss < so_far:
                line += [(x(index), line[-1][1])] if line else []
                so_far = loss
            line.append((x(index), y(so_far)))
            tip = f"{each.path.name}, trial {index}: {loss:.4f}, best so far {so_far:.4f}"
            svg.mark(root, kind, x(index), y(loss), tip, "faint", size=3.2)
        svg.add(root, "path", f"best kind{kind % svg.KINDS}", d=svg.path(line))
    return svg.markup(root)

"""The picture of `was compare`: a panel for each thing that there is to see."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from was_fx.cli.input.compare_inputs import Compared, Results, Trials
from was_fx.cli.render.grid import share_labels
from was_fx.cli.render.picture_file import write_picture
from was_fx.schedules.names import visible

_MARKERS = "os^Dv<>PX*"


def draw(path: Path, compared: Sequence[Compared], results: Results | None, searches: Sequence[Trials]) -> None:
    """Draw into a file whose ending says the format. The same input gives the same picture.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    panels: list[Callable[[Any], None]] = []
    if compared:
        panels.append(lambda axes: _shares(axes, "block", [each.blocks for each in compared]))
        panels.append(lambda axes: _shares(axes, "projection", [each.projections for each in compared]))
    if results is not None and any(each.measured for each in compared):
        panels.append(lambda axes: _perplexities(axes, compared, results))
    if searches:
        panels.append(lambda axes: _searches(axes, searches))
    rows = math.ceil(len(panels) / 2)
    columns = min(len(panels), 2)

    def picture(figure: Any) -> None:
        for position, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(rows, columns, position))
        if compared:
            handles = figure.axes[0].get_lines()
            figure.legend(handles, [_label(*pair) for pair in enumerate(compared, 1)], loc="outside lower center")

    size = 6.4 * columns, 4.4 * rows + 0.25 * len(compared)
    write_picture(path, size, 150, picture, {"text.parse_math": False})  # names are no formulas


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "marker": _MARKERS[number // 10 % len(_MARKERS)], "markersize": 4}


def _label(number: int, each: Compared) -> str:
    return visible(f"#{number}  {each.name}, {each.schedule.metadata.recipe}, {100 * each.schedule.sparsity:.1f} %")


def _shares(axes: Any, what: str, shares: Sequence[Mapping[str, float]]) -> None:
    labels = share_labels(what, shares)
    keys = list(labels)
    for number, each in enumerate(shares):
        values = [100 * each.get(key, math.nan) for key in keys]
        axes.plot(range(len(keys)), values, linewidth=1.2 if what == "block" else 0.6, **_style(number))
    step = max(1, len(keys) // 16)
    axes.set_xticks(range(0, len(keys), step), [labels[key] for key in keys[::step]])
    axes.set_xlabel(what)
    axes.set_ylabel("sparsity in %, weighted by N·K")
    axes.set_title(f"Sparsity by {what}")


def _perplexities(axes: Any, compared: Sequence[Compared], results: Results) -> None:
    dense_style = {"color": "0.3", "marker": "*", "markersize": 7}
    points = [("dense", results.dense, dense_style)]
    points += [(f"#{number}", each.measured, _style(number - 1)) for number, each in enumerate(compared, start=1)]
    for label, row, style in points:
        if row is not None:
            place = (100 * row.bytes_saved, row.perplexity)
            axes.plot(*place, linestyle="", **style)
            axes.annotate(label, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("bytes saved, % of all weights that a token reads")
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity against bytes saved")


def _searches(axes: Any, searches: Sequence[Trials]) -> None:
    for number, each in enumerate(searches):
        best, so_far = math.inf, []
        for loss in each.losses:
            best = min(best, loss) if math.isfinite(loss) else best
            so_far.append(best if math.isfinite(best) else math.nan)
        color = f"C{number % 10}"
        axes.plot(each.indices, each.losses, linestyle="", marker=".", markersize=4, color=color, alpha=0.5)
        label = visible(f"#{number + 1}  {each.path.name}")
        axes.step(each.indices, so_far, where="post", color=color, linewidth=1.4, label=label)
    axes.set_xlabel("trial")
    axes.set_ylabel("loss in nats per token")
    axes.set_title("Search: every trial, and the best so far")
    axes.legend(fontsize=8)

"""The picture of `was recommend`: what loss buys, in bytes and in time."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_fx.cli.render.picture_file import write_picture

if TYPE_CHECKING:
    from was_fx.searching.recommendation import Point, Recommendation


def draw(path: Path, found: "Recommendation") -> None:
    """Draw into a file whose ending says the format.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    timed = found.best.ms_per_token is not None

    def picture(figure: Any) -> None:
        _panel(figure.add_subplot(1, 1 + timed, 1), found, "MB of weights per token", bytes_axis)
        if timed:
            _panel(figure.add_subplot(1, 2, 2), found, "ms per token", time_axis)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))

    write_picture(path, (6.4 * (1 + timed), 4.8), 120, picture)


def bytes_axis(point: "Point") -> float | None:
    """Megabytes of weights that a token reads."""
    return point.bytes_per_token / 1e6


def time_axis(point: "Point") -> float | None:
    """Milliseconds of a token, if they were measured."""
    return point.ms_per_token


def _panel(axes: Any, found: "Recommendation", label: str, at: Any) -> None:
    for number, weights in enumerate(dict.fromkeys(point.weights for point in found.points)):
        points = [point for point in found.points if point.weights == weights and at(point) is not None]
        places = [(at(point), 100 * math.expm1(point.added)) for point in points]
        axes.plot(*zip(*places, strict=True), color=f"C{number}", marker="o", markersize=4, label=weights)
        for point, place in zip(points, places, strict=True):
            if point in found.choices or point.target in (0, points[-1].target):
                text = f"{100 * point.target:g} %"
                axes.annotate(text, place, xytext=(4, 5), textcoords="offset points", fontsize=8, color=f"C{number}")
    budget = 100 * math.expm1(found.budget)
    axes.axhline(budget, color="0.3", linestyle="--", linewidth=1, label=f"budget, {budget:.3g} %")
    place = (at(found.best), 100 * math.expm1(found.best.added))
    axes.plot(*place, linestyle="", marker="*", markersize=16, color="C3", label="recommended", zorder=3)
    # Small losses are what is decided on, and large ones are to be seen too.
    axes.set_yscale("symlog", linthresh=max(budget, 0.1), linscale=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{label} (left is less)")
    axes.set_ylabel("perplexity above the dense model, %")

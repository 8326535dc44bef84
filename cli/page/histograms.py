"""How the scores of Linears are distributed, and where schedules cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from torch import Tensor

from was_fx import Calibration, Schedule
from was_fx.cli.page import svg
from was_fx.cli.render.grid import short_names
from was_fx.schedules.experts import groups
from was_fx.schedules.names import by_block
from was_fx.schedules.score import Score

_WIDTH, _HEIGHT = 210, 118
_BINS = 48
# Blocks that are shown, spread over the depth.
_BLOCKS = 4
_SHOWN_FROM = 0.02  # the share of the smallest scores that is left out at the left


@dataclass(frozen=True)
class Histogram:
    """A drawing, and what it is of."""

    name: str
    drawing: Markup


@dataclass(frozen=True)
class Histograms:
    """Some Linears of a calibration.

    Attributes:
        drawings: block by block, as many as `columns` of each.
        columns: projections of a block.
        score: what was measured, in a few words.
        left_out: schedules whose thresholds are of another score.
    """

    drawings: tuple[Histogram, ...]
    columns: int
    score: str
    left_out: tuple[str, ...]


def histograms(calibration: Calibration, schedules: Mapping[str, Schedule]) -> Histograms:
    """The Linears of a few blocks, spread over the depth, with the thresholds of schedules that have the same score."""
    names = [members[0] for members in groups(calibration.thresholds).values()]
    rows, _ = by_block({name: name for name in names})
    keys = list(rows)
    chosen = sorted({round(at) for at in np.linspace(0, len(keys) - 1, min(_BLOCKS, len(keys)))}) if keys else []
    score, thresholds, fitting = _drawn(calibration, schedules)
    kinds = {name: position for position, name in enumerate(schedules)}
    drawings = []
    levels = calibration.levels.double().numpy()
    short = short_names(projection for row in rows.values() for projection in row)
    for at in chosen:
        for projection, name in rows[keys[at]].items():
            label = f"block {keys[at][1]}, {short[projection]}"
            cuts = [
                (kinds[key], key, each.linears[name].threshold) for key, each in fitting.items() if name in each.linears
            ]
            drawings.append(Histogram(label, _draw(levels, thresholds[name].double().numpy(), name, label, cuts)))
    left_out = tuple(name for name in schedules if name not in fitting)
    return Histograms(tuple(drawings), max(map(len, rows.values()), default=0), score, left_out)


def _drawn(
    calibration: Calibration, schedules: Mapping[str, Schedule]
) -> tuple[str, Mapping[str, Tensor], dict[str, Schedule]]:
    """Which of a calibration's scores are drawn, those that more schedules have: their name, their quantiles by Linear,
    and these schedules."""
    fitting = {name: each for name, each in schedules.items() if _same_score(each, calibration.score)}
    plain = str(calibration.score), calibration.thresholds, fitting
    if calibration.fisher is None:
        return plain
    weights = calibration.fisher.weights
    by_loss = {name: each for name, each in schedules.items() if _cut_by_loss(each, weights)}
    return plain if len(fitting) >= len(by_loss) else ("|x|·Fisher weight", calibration.fisher.thresholds, by_loss)


def _same_score(schedule: Schedule, score: Score) -> bool:
    return all(
        schedule.score(name) == score and linear.channel_threshold is None for name, linear in schedule.linears.items()
    )


def _cut_by_loss(schedule: Schedule, weights: Mapping[str, Tensor]) -> bool:
    """Whether channel thresholds t are τ / g with the Fisher weights g of a calibration."""
    for name, linear in schedule.linears.items():
        if linear.channel_threshold is None or name not in weights:
            return False
        known = weights[name] > 0
        scores = linear.channel_threshold[known] * weights[name][known]
        if not bool(scores.sub(linear.threshold).abs().le(1e-4 * linear.threshold).all()):
            return False
    return True


def _draw(
    levels: np.ndarray, thresholds: np.ndarray, name: str, label: str, cuts: Sequence[tuple[int, str, float]]
) -> Markup:
    start = float(np.interp(_SHOWN_FROM, levels, thresholds))
    end = float(thresholds[-1])
    named = [f"{key} cuts at {cut:.3g} ({100 * _share(levels, thresholds, cut):.0f} %)" for _, key, cut in cuts]
    root = svg.drawing(_WIDTH, _HEIGHT, f"Scores of {name}", "; ".join(named) or "no thresholds")
    bottom = _HEIGHT - 20
    if not end > start > 0:
        svg.write(root, _WIDTH / 2, _HEIGHT / 2, "no spread", "head", text_anchor="middle")
        return svg.markup(root)
    edges = np.geomspace(start, end, _BINS + 1)
    mass = np.diff(np.interp(edges, thresholds, levels))
    x = svg.Scale(start, end, 6, _WIDTH - 6, logarithmic=True)
    y = svg.Scale(0.0, float(mass.max()), bottom, 16)
    middles = np.sqrt(edges[1:] * edges[:-1])
    outline = [(x(float(at)), y(float(share))) for at, share in zip(middles, mass, strict=True)]
    area = [(outline[0][0], bottom), *outline, (outline[-1][0], bottom)]
    svg.add(root, "path", "area", f"{name}, {label}", d=svg.path(area, closed=True))
    svg.add(root, "line", "base", x1=6, x2=_WIDTH - 6, y1=bottom, y2=bottom)
    for value, anchor in ((start, "start"), (end, "end")):
        svg.write(root, x(value), bottom + 15, _round(value), "head", text_anchor=anchor)
    for (kind, _, cut), tip in zip(cuts, named, strict=True):
        if start <= cut <= end:
            at = x(cut)
            svg.add(root, "line", f"cut kind{kind % svg.KINDS}", tip, x1=at, x2=at, y1=8, y2=bottom)
    return svg.markup(root)


def _share(levels: np.ndarray, thresholds: np.ndarray, cut: float) -> float:
    return float(np.interp(cut, thresholds, levels))


def _round(value: float) -> str:
    """Two digits, without an exponent where there is room: `170`, `0.0045`."""
    return f"{float(f'{value:.2g}'):g}"

"""Draw the pictures of the documentation: docs/pictures/*.svg.

    python scripts/draw_pictures.py

Figures in them are read from the tables of docs/quality.md and docs/performance.md, so that they say the same.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
# On a card of its own, so that a picture is legible on any page, light or dark.
STYLE = """
svg { --card: #ffffff; --ink: #263238; --faint: #90a4ae; --line: #cfd8dc; --keep: #00897b; --second: #e67e22; --third: #8e44ad; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1b2028; --ink: #eceff1; --faint: #90a4ae; --line: #455a64; --keep: #26c6b4; --second: #f5a65b; --third: #c79be0; }
}
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.small { font-size: 12px; } .faint { fill: var(--faint); } .bold { font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
"""  # noqa: E501
COLOURS = ("keep", "second", "third")


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """An SVG; its title is what a screen reader says."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f'<rect width="{width}" height="{height}" rx="10" style="fill: var(--card)"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """A line of text; `kind` are classes of the style."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = "none", stroke: str = "line") -> str:
    """A rectangle; colours are names of the style."""
    paint = fill if fill == "none" else f"var(--{fill})"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
        f'style="fill: {paint}; stroke: var(--{stroke})"/>'
    )


def line(points: Iterable[tuple[float, float]], colour: str = "line", dash: str = "", arrow: bool = False) -> str:
    """A line through points."""
    points = list(points)
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    head = ""
    if arrow:
        (x0, y0), (x, y) = points[-2:]
        angle = math.degrees(math.atan2(y - y0, x - x0))
        where = f"translate({x:g} {y:g}) rotate({angle:g})"
        head = f'<path d="M0 0L-8 -4V4z" transform="{where}" style="fill: var(--{colour})"/>'
    return (
        f'<polyline points="{path}" style="fill: none; stroke: var(--{colour}); stroke-width: 1.5; '
        f'stroke-dasharray: {dash or "none"}"/>{head}'
    )


def one_token() -> str:
    """What a Linear reads for one token: inputs under their threshold leave their rows of the weight unread."""
    sizes = [0.82, 0.12, 0.45, 0.07, 0.95, 0.22, 0.16, 0.66, 0.09, 0.31]
    limits = [0.30, 0.34, 0.22, 0.30, 0.40, 0.30, 0.25, 0.20, 0.36, 0.42]
    parts = [
        text(24, 32, "|x| against its threshold", "bold"),
        text(300, 32, "the weight, one row for each input channel", "bold"),
        text(24, 366, "A channel's threshold is τ / ‖W‖ of its own row: heavy rows are kept sooner.", "small faint"),
    ]
    kept = 0
    for index, (size, limit) in enumerate(zip(sizes, limits, strict=True)):
        y, keep = 52 + 29 * index, size > limit
        kept += keep
        parts += [
            box(24, y, 200, 18),
            box(24, y, 200 * size, 18, "keep" if keep else "line"),
            line([(24 + 200 * limit, y - 3), (24 + 200 * limit, y + 21)], "ink"),
            line([(232, y + 9), (290, y + 9)], "keep" if keep else "line", "" if keep else "3 4", arrow=keep),
            *(box(300 + 22 * column, y, 18, 18, "keep" if keep else "none") for column in range(14)),
            text(622, y + 14, "read" if keep else "not read", "small" if keep else "small faint"),
        ]
    title = f"For one token {kept} of {len(sizes)} rows of a weight are read: those whose input is above its threshold"
    return picture(700, 384, title, parts)


def pipeline() -> str:
    """From a model to faster decoding: commands and the files between them."""
    steps = [
        ("was calibrate", "model + text", "calibration", "scores of every Linear"),
        ("was make", "or was search", "schedule", "a threshold for each Linear"),
        ("was ppl", "or was check", "numbers", "perplexity, bytes saved"),
        ("was generate", "or sparsify(model)", "tokens", "weights mostly unread"),
    ]
    parts = []
    for index, (command, under, result, what) in enumerate(steps):
        x = 20 + 218 * index
        parts += [
            box(x, 30, 160, 58, "none", "keep"),
            text(x + 80, 55, command, "middle bold"),
            text(x + 80, 75, under, "middle small faint"),
            line([(x + 80, 88), (x + 80, 122)], "faint", arrow=True),
            text(x + 80, 142, result, "middle"),
            text(x + 80, 160, what, "middle small faint"),
        ]
        if index < len(steps) - 1:
            parts.append(line([(x + 160, 59), (x + 216, 59)], "faint", arrow=True))
    return picture(854, 182, "calibrate, make or search, measure, generate", parts)


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading of a page, its own heading row first."""
    after = (DOCS / page).read_text(encoding="utf-8").split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\|\n)+", after, re.MULTILINE)
    assert table is not None
    rows = [[cell.strip().strip("*") for cell in row.strip().strip("|").split("|")] for row in table[0].splitlines()]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


def number(cell: str) -> float:
    """The first number of a cell."""
    found = re.search(r"\d+(\.\d+)?", cell)
    assert found is not None, cell
    return float(found[0])


# Name of a format, level, column of the cost and perplexity by the recipe fisher.
Point = tuple[str, float, float]


def formats_by(column: str) -> dict[str, list[Point]]:
    """(level, cost, perplexity) of each format of weights; the cost is what a column has, where it was measured."""
    heading, *rows = rows_of("quality.md", "## Formats of weights")
    at = heading.index(column)
    series: dict[str, list[Point]] = {}
    for row in rows:
        name, level = row[0].split(", ")
        if row[at]:
            perplexity = number(row[2] if level == "0 %" else row[3])
            series.setdefault(name, []).append((level, number(row[at]), perplexity))
    return series


def panel(series: dict[str, list[Point]], left: float, right: float, ticks: list[float], unit: str) -> list[str]:
    """Perplexity against a cost, a line for each format, between two x of a picture."""
    top, bottom, low, high = 50, 330, 17, 25

    def place(cost: float, perplexity: float) -> tuple[float, float]:
        x = left + (right - left) * (cost - ticks[0]) / (ticks[-1] - ticks[0])
        return x, bottom - (bottom - top) * (perplexity - low) / (high - low)

    parts: list[str] = []
    named: list[tuple[float, float]] = []
    for value in range(low, high + 1):
        y = place(ticks[0], value)[1]
        parts += [line([(left, y), (right, y)]), text(left - 10, y + 4, str(value), "end small faint")]
    for value in ticks:
        parts.append(text(place(value, low)[0], bottom + 20, f"{value:g} {unit}", "middle small faint"))
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        places = [place(cost, perplexity) for _, cost, perplexity in points]
        parts.append(line(places, colour))
        for (x, y), (level, *_) in zip(places, points, strict=True):
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" style="fill: var(--{colour})"/>')
            dense = level == "0 %"
            shift = (-14, 20) if dense else (7, -7)
            if all(math.dist((x, y), other) > 14 for other in named):  # else it would be written over another
                parts.append(text(x + shift[0], y + shift[1], f"{name}, {level}" if dense else level, "small"))
            named.append((x, y))
    return parts


FORMATS = "SmolLM2-135M, recipe fisher, WikiText-2: the table in quality.md"


def formats_and_sparsity() -> str:
    """Perplexity against megabytes read for a token, by format of the weights."""
    parts = [
        text(24, 30, "Perplexity (lower is better) against the megabytes of weights that a token reads", "bold"),
        *panel(formats_by("MB a token"), 70, 690, [*range(0, 281, 40)], "MB"),
        text(24, 374, FORMATS, "small faint"),
    ]
    return picture(780, 390, "Perplexity against megabytes per token for bf16, int8 and int4 at 0 to 50 %", parts)


def loss_and_time() -> str:
    """Perplexity against the time of a token, on a GPU and on a CPU, by format of the weights."""
    parts = [
        text(24, 30, "Perplexity (lower is better) against milliseconds per token (left is faster)", "bold"),
        *panel(formats_by("ms, H200"), 50, 370, [0.6, 0.8, 1.0, 1.2, 1.4, 1.6], "ms"),
        text(210, 374, "NVIDIA H200", "middle small"),
        *panel(formats_by("ms, CPU"), 440, 760, [*range(6, 17, 2)], "ms"),
        text(600, 374, "two CPU cores, AVX2", "middle small"),
        text(24, 402, FORMATS, "small faint"),
    ]
    return picture(830, 418, "Perplexity against milliseconds per token for bf16, int8 and int4 at 0 to 50 %", parts)


def speed() -> str:
    """Milliseconds of a decode step by level."""
    rows = rows_of("performance.md", "### Measured")[1:]
    parts = [text(24, 30, "Milliseconds per decode step, shorter is faster", "bold")]
    longest = max(number(row[2]) for row in rows)
    for index, (level, _, milliseconds, against, _, read, _) in enumerate(rows):
        y, width = 48 + 38 * index, 430 * number(milliseconds) / longest
        parts += [
            text(80, y + 18, level, "end"),
            box(92, y, width, 26, "line" if index == 0 else "keep"),
            text(100 + width, y + 18, f"{milliseconds} ms · {against.strip('*')} · {read}", "small"),
        ]
    y = 48 + 38 * len(rows)
    parts.append(text(24, y + 18, "Llama-3-8B shapes, bf16, NVIDIA H200: the table in performance.md", "small faint"))
    return picture(740, y + 34, "Milliseconds per decode step, dense and at 40, 50, 60 and 75 %", parts)


PICTURES = {
    "one-token": one_token,
    "pipeline": pipeline,
    "formats": formats_and_sparsity,
    "loss-and-time": loss_and_time,
    "speed": speed,
}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (DOCS / "pictures" / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Drawings as SVG elements: scales, axes and marks, in colours that the page's style sheet names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from was_fx.schedules.names import visible

Element = ElementTree.Element

# As many colours and marks as the style sheet has; further ones begin anew.
KINDS = 6


@dataclass(frozen=True)
class Scale:
    """From values to places in a drawing.

    Attributes:
        low, high: the values at both ends.
        start, end: their places.
        logarithmic: equal steps are equal ratios; values are then above 0.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(each) if self.logarithmic else each for each in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values inside a range, at most so many."""
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(each for each in (size, 2 * size, 5 * size, 10 * size, 20 * size) if (high - low) / each <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(step * each, 12) for each in range(first, math.floor(high / step + 1e-9) + 1)]


def drawing(width: float, height: float, title: str, description: str) -> Element:
    """An empty drawing that scales with the page; both texts are for those who can't see it."""
    label = visible(f"{title}. {description}")
    return Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label})


def add(parent: Element, tag: str, css: str = "", tip: str = "", **attributes: float | str) -> Element:
    """A shape; `tip` is shown on hover. A trailing `_` of an attribute's name goes, others become hyphens."""
    names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    values = {key: value if isinstance(value, str) else f"{value:.6g}" for key, value in names.items()}
    element = ElementTree.SubElement(parent, tag, values)
    if css:
        element.set("class", css)
    if tip:
        ElementTree.SubElement(element, "title").text = visible(tip)
    return element


def write(parent: Element, x: float, y: float, text: str, css: str = "", **attributes: float | str) -> Element:
    """A line of text, from `x` on unless `text_anchor` says otherwise."""
    element = add(parent, "text", css, "", x=x, y=y, **attributes)
    element.text = visible(text)
    return element


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """The `d` of a line through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")


def mark(parent: Element, kind: int, x: float, y: float, tip: str = "", css: str = "", size: float = 5.5) -> Element:
    """A point of the kind of so many; each has a colour and a shape of its own."""
    shape = kind % KINDS
    css = f"mark kind{shape} {css}".strip()
    if shape == 0:
        return add(parent, "circle", css, tip, cx=x, cy=y, r=size)
    corners = [(4, 0.79), (3, -math.pi / 2), (4, 0.0), (3, math.pi / 2), (6, 0.0)]
    count, turn = corners[shape - 1]
    angles = [turn + 2 * math.pi * each / count for each in range(count)]
    outline = [(x + 1.25 * size * math.cos(each), y + 1.25 * size * math.sin(each)) for each in angles]
    return add(parent, "path", css, tip, d=path(outline, closed=True))


def axes(parent: Element, x: Scale, y: Scale, x_label: str, y_label: str, x_ticks: int = 6) -> None:
    """Grid lines, numbers and labels; `y` runs upwards, from its start at the bottom."""
    grid = add(parent, "g", "axes", aria_hidden="true")
    for value in ticks(y.low, y.high):
        add(grid, "line", x1=x.start, x2=x.end, y1=y(value), y2=y(value))
        write(grid, x.start - 6, y(value) + 4, f"{value:g}", text_anchor="end")
    for value in ticks(x.low, x.high, x_ticks):
        add(grid, "line", x1=x(value), x2=x(value), y1=y.start, y2=y.end)
        write(grid, x(value), y.start + 17, f"{value:g}", text_anchor="middle")
    write(grid, x.end, y.start + 36, x_label, "label", text_anchor="end")
    write(grid, x.start - 6, y.end - 10, y_label, "label", text_anchor="start")


def markup(element: Element) -> Markup:
    """An element as text of a page; what was written into it is escaped."""
    return Markup(ElementTree.tostring(element, encoding="unicode"))

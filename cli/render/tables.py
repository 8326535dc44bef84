"""How numbers and tables look."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from was_fx.schedules.names import visible

# From pale yellow to dark red in the 256 colours. Foreground and background are both set, so a cell reads the same
# on a dark and on a light terminal.
_HEAT = (230, 229, 223, 222, 215, 209, 203, 160, 124, 88)
_DARK_FROM = 7
# Ink and paper of differences, by thirds of the largest.
_MORE = ((16, 224), (16, 210), (231, 160))
_LESS = ((16, 189), (16, 117), (231, 25))


class NameTable(Table):
    """A table whose cells may be names: text on one line."""

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row of strings, or of `Text` that has a style."""
        super().add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in cells), **settings)


def new_table(*columns: str, texts: int = 1, **settings: Any) -> NameTable:
    """A table whose first columns are text, so many as `texts` says, and whose others are numbers.

    The first column is folded where it is too long.
    """
    table = NameTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", **settings)
    for index, name in enumerate(columns):
        if index < texts:
            table.add_column(visible(name), overflow="fold")
        else:
            table.add_column(visible(name), justify="right", no_wrap=True)
    return table


def percent(share: float) -> str:
    """`0.4375` as `43.8 %`."""
    return f"{100 * share:.1f} %"


def significant(number: float, digits: int) -> str:
    """A number with so many significant digits: `29.0`, `0.0544`."""
    return f"{number:#.{digits}g}".removesuffix(".")


def heat(text: str, share: float) -> Text:
    """`text` on a colour that goes with a share from 0 to 1."""
    step = min(int(share * len(_HEAT) + 1e-4), len(_HEAT) - 1)
    ink = 231 if step >= _DARK_FROM else 16
    return Text(text, style=f"color({ink}) on color({_HEAT[step]})")


def bar(share: float, width: int) -> Text:
    """A share from 0 to 1 as a bar; it is drawn with characters, so that it needs no colour."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    text = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
    return Text(text.ljust(width, "·"), style="dim" if not eighths else "")


def shade(share: float) -> str:
    """A share from 0 to 1 as one character, where there is no colour to show it by."""
    return "▁▂▃▄▅▆▇█"[min(int(min(max(share, 0.0), 1.0) * 8), 7)]


def change(text: str, points: float, most: float) -> Text:
    """`text` on red where a difference is above 0, on blue where it is below; stronger the nearer to `most`."""
    if abs(points) < 5e-4:
        return Text(text, style="dim")
    ink, paper = (_MORE if points > 0 else _LESS)[min(int(3 * abs(points) / most), 2)]
    return Text(text, style=f"color({ink}) on color({paper})")


def megabytes(count: float) -> str:
    """A number of bytes as `123.4 MB`."""
    return f"{count / 1e6:,.1f} MB"

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


def megabytes(count: float) -> str:
    """A number of bytes as `123.4 MB`."""
    return f"{count / 1e6:,.1f} MB"

"""How numbers and tables look."""

from rich import box
from rich.table import Table
from rich.text import Text

# From pale yellow to dark red in the 256 colours. Foreground and background are both set, so a cell reads the same
# on a dark and on a light terminal.
_HEAT = (230, 229, 223, 222, 215, 209, 203, 160, 124, 88)
_DARK_FROM = 7


def new_table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=bool(index))
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

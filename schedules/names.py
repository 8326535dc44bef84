"""Names: the place of a Linear in a model, the nearest known name to a wrong one, and how any name is shown."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Cell = TypeVar("Cell")

_SUGGESTIONS = 20
# Control characters, separators of lines, marks that turn the direction of text, and halves of surrogate pairs.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\|\[\]<>*`~$&]|(?<!\w)_|_(?!\w)|(?<=:)//|(?<=www)\.|@")


def split_name(name: str) -> tuple[int | None, str]:
    """Split a qualified name into block index and projection, for any architecture.

    The block index is the first path component that is an integer, the projection is what follows it.
    `model.layers.3.mlp.up_proj` gives `(3, "mlp.up_proj")`. A name without an integer component lies
    outside the blocks: `lm_head` gives `(None, "lm_head")`.
    """
    components = name.split(".")
    for position, component in enumerate(components):
        if component.isdecimal():
            return int(component), ".".join(components[position + 1 :])
    return None, name


def by_block(cells: Mapping[str, Cell]) -> tuple[dict[tuple[str, int], dict[str, Cell]], dict[str, Cell]]:
    """What there is for each Linear: by (prefix, block) and projection, and of those outside the blocks by name."""
    rows: dict[tuple[str, int], dict[str, Cell]] = {}
    others: dict[str, Cell] = {}
    for name, cell in cells.items():
        block, projection = split_name(name)
        if block is None or not projection:
            others[name] = cell
        else:
            rows.setdefault((name.removesuffix(f".{block}.{projection}"), block), {})[projection] = cell
    return rows, others


def suggestion(name: str, known: Collection[str]) -> str:
    """` (did you mean …?)` with the known name closest to `name`, or an empty string if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def unknown_problems(names: Iterable[str], known: Collection[str], problem: str) -> list[str]:
    """One line `<name> <problem> (did you mean …?)` per name.

    Only the first 20 lines get a suggestion, since each is a search through all of `known`.
    """
    return [
        f"{name} {problem}{suggestion(name, known) if position < _SUGGESTIONS else ''}"
        for position, name in enumerate(names)
    ]


def visible(text: object, *, keep: str = "") -> str:
    """`text` in one printable line: an escape character as `\\x1b`, a line break as `\\n`.

    Names come from files that others made, so they may hold anything.

    Args:
        text: what is shown, as `str` gives it.
        keep: characters to leave as they are, such as a line break in a text of several lines.
    """

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _INVISIBLE.sub(escaped, str(text))


def markdown(text: object) -> str:
    """`text` as Markdown that shows it as it is, in a cell of a table too: no link, emphasis, HTML or further cell."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}" if found[0] != "//" else "/\\/", visible(text))


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]], rule: str) -> list[str]:
    """The lines of a Markdown table; `rule` is the one below the headings."""
    headings, *lines = (f"| {' | '.join(map(markdown, cells))} |" for cells in (columns, *rows))
    return [headings, rule, *lines]

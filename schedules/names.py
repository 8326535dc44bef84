"""Qualified names of Linears: their place in a model, and the nearest known name to a wrong one."""

import difflib
from collections.abc import Collection, Iterable

_SUGGESTIONS = 20


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

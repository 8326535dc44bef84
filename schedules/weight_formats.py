"""Formats of weights, as calibrations and schedules record them: of each quantised Linear, by qualified name."""

from collections import Counter
from collections.abc import Mapping


def describe(formats: Mapping[str, str]) -> str:
    """In a few words: "int4-32 (28 Linears), int8 (1)", or "not quantised"."""
    counts = Counter(formats.values()).most_common()
    if not counts:
        return "not quantised"
    (format, count), *others = counts
    first = f"{format} ({count} {'Linear' if count == 1 else 'Linears'})"
    return ", ".join([first, *(f"{format} ({count})" for format, count in others)])

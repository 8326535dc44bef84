"""The section of a model card that shows a schedule."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from was_fx.modules.auto_class import auto_class_of
from was_fx.schedules.files.atomic import write_atomically
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.names import by_block, markdown, markdown_table

TAGS = ("was-fx", "activation-sparsity")
_BEGIN, _END = "<!-- was-fx: begin -->", "<!-- was-fx: end -->"


def update_card(path: Path, schedule: Schedule, repository: str | None = None) -> None:
    """Put the tags and the section into the model card at `path`; a section from before is replaced.

    Args:
        path: a README.md of a Hub repository; made if there is none.
        schedule: what the section shows.
        repository: name of the repository, for the section's example.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: transformers\n---\n")
    data: Any = card.data
    tags = data.get("tags") or []
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    section = f"{_BEGIN}\n{schedule_section(schedule, repository)}\n{_END}"
    old = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    known = old.search(card.text)
    # Never as a replacement pattern: names may hold backslashes.
    card.text = (
        card.text[: known.start()] + section + card.text[known.end() :]
        if known
        else f"{card.text.rstrip()}\n\n{section}\n"
    )
    write_atomically(path, str(card))


def schedule_section(schedule: Schedule, repository: str | None = None) -> str:
    """Markdown: what the schedule is, how to use it, and its sparsity per block and projection."""
    about = schedule.metadata
    source = f", calibrated on {about.calibration_tokens:,} tokens" if about.calibration_tokens else ""
    exponents = {entry.exponent for entry in schedule.linears.values()}
    score = f"|x|·‖W‖{schedule.norm}^α, α from {min(exponents):g} to {max(exponents):g}"
    if len(exponents) == 1:
        score = str(schedule.score(next(iter(schedule.linears))))
    auto = auto_class_of(str(about.fingerprint.get("architecture"))).__name__
    return f"""## Sparse decoding

With was-fx this model decodes faster, because weight columns whose input is
negligible are not read. The checkpoint is a plain one and works without was-fx, dense.

```python
import was_fx  # makes from_pretrained return the model sparsified
from transformers import {auto}

model = {auto}.from_pretrained({(repository or "this repository")!r})
```

Schedule: recipe {markdown(about.recipe)}, score {score}, {len(schedule.linears)} Linears at a model sparsity of
{100 * schedule.sparsity:.1f} %{source}. Share of the input channels that a token skips, in percent:

{schedule_table(schedule)}"""


def schedule_table(schedule: Schedule) -> str:
    """Sparsity in percent as a Markdown table, a row per block and a column per projection.

    Blocks that follow each other with equal numbers share a row. Linears outside the blocks have a table of their own.
    """
    rows, others = by_block({name: f"{100 * entry.sparsity:.1f}" for name, entry in schedule.linears.items()})
    columns = list(dict.fromkeys(projection for row in rows.values() for projection in row))
    lines = [[label, *(row.get(column, "–") for column in columns)] for label, row in _merged(rows)]
    tables = [_markdown(["block", *columns], lines)] if lines else []
    tables += [_markdown(["Linear", "sparsity"], others.items())] if others else []
    return "\n\n".join(tables)


def _markdown(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(markdown_table(columns, rows, f"| {' | '.join(['---', *['---:'] * (len(columns) - 1)])} |"))


def _merged(rows: dict[tuple[str, int], dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """(label, row) with neighbours that are equal under one label, such as 0–11."""
    several = len({prefix for prefix, _ in rows}) > 1
    groups: list[tuple[str, int, int, dict[str, str]]] = []
    for (prefix, block), row in rows.items():
        if groups and groups[-1][0] == prefix and groups[-1][2] == block - 1 and groups[-1][3] == row:
            groups[-1] = (prefix, groups[-1][1], block, row)
        else:
            groups.append((prefix, block, block, row))
    labelled = []
    for prefix, first, last, row in groups:
        label = str(first) if first == last else f"{first}–{last}"
        labelled.append((f"{prefix}.{label}" if several else label, row))
    return labelled

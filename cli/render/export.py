"""A schedule as a table for other programs, and for a page."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_fx.cli.render.grid import short_names
from was_fx.cli.render.tables import percent
from was_fx.schedules.files.atomic import write_atomically
from was_fx.schedules.names import by_block, markdown, markdown_table, split_name
from was_fx.schedules.summary import by_depth, by_projection, group_means

if TYPE_CHECKING:
    from was_fx import Schedule

ENDINGS = (".csv", ".json", ".md")
_COLUMNS = ("name", "block", "projection", "n", "k", "sparsity", "threshold", "exponent")


def export_schedule(path: Path, name: str, schedule: "Schedule", content: Mapping[str, Any]) -> None:
    """Write a schedule, atomically, in the format that the file's ending says.

    Args:
        path: of the file; ends in one of `ENDINGS`.
        name: what the user called the schedule.
        schedule: which.
        content: what `--json` prints of it.

    Raises:
        OSError: the file can't be written.
    """
    ending = path.suffix.lower()
    if ending == ".csv":
        write_atomically(path, _csv(schedule))
    elif ending == ".json":
        write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    else:
        write_atomically(path, _markdown(name, schedule, content))


def _csv(schedule: "Schedule") -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for name, each in schedule.linears.items():
        block, projection = split_name(name)
        n, k = schedule.shapes[name]
        rows.writerow([name, "" if block is None else block, projection, n, k, *_numbers(each)])
    return text.getvalue()


def _numbers(linear: Any) -> list[float]:
    return [linear.sparsity, linear.threshold, linear.exponent]


def _markdown(name: str, schedule: "Schedule", content: Mapping[str, Any]) -> str:
    means = group_means(schedule)
    rows, others = by_block({each: each for each in means})
    projections = list(dict.fromkeys(projection for row in rows.values() for projection in row))
    short = short_names(projections)
    several = len({prefix for prefix, _ in rows}) > 1
    cells = [
        [
            f"{prefix}.{block}" if several else str(block),
            *(f"{100 * means[row[each]]:.1f}" if each in row else "" for each in projections),
        ]
        for (prefix, block), row in rows.items()
    ]
    cells += [[each, f"{100 * means[each]:.1f}", *[""] * (len(projections) - 1)] for each in others]
    lines = [
        f"# {markdown(name)}",
        "",
        f"{100 * schedule.sparsity:.2f} % nominal, {markdown(schedule.metadata.recipe)}.",
    ]
    lines += ["", *(f"- {markdown(warning)}" for warning in content["warnings"])]
    for each in content["predicted"]:
        lines.append(f"- {each['gpu']}: {each['ms']:.2f} ms per token predicted from {each['measured']} measured steps")
    lines += ["", "## Sparsity in %", ""]
    lines += markdown_table(["block", *short.values()], cells, "|" + "---|" * (1 + len(projections)))
    for what, parts in (("projection", by_projection(schedule)), ("blocks", by_depth(schedule))):
        table = [[key, percent(each.sparsity), f"{each.dropped:,.0f}"] for key, each in parts.items()]
        lines += [
            "",
            f"## By {what}",
            "",
            *markdown_table([what, "sparsity", "weights not read"], table, "|---|---|---|"),
        ]
    return "\n".join(lines) + "\n"

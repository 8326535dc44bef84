"""`was coverage`: which causal LM and multimodal classes of transformers was-fx covers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import check_output
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.coverage_page import cells, notes, page
from was_fx.cli.render.tables import new_table

if TYPE_CHECKING:
    from was_fx.coverage.cover import Coverage

EXAMPLES = options.examples(
    "was coverage llama gemma3 deepseek_v3  [dim]these model types; some seconds each[/]",
    "was coverage --record coverage.jsonl  [dim]all of them; an hour, goes on where it stopped[/]",
    "was coverage --no-graphs --record coverage.jsonl --markdown docs/coverage.md  [dim]half of that[/]",
)


def coverage(
    types: Annotated[
        list[str] | None, typer.Argument(metavar="[TYPE]...", help="Model types, as in config.json; by default all.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up on a type after so long.")] = 180.0,
    graphs: Annotated[
        bool, typer.Option(help="Also look at what torch.compile makes of each; most of the time goes there.")
    ] = True,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON Lines with a line per type, added to as each is done. Types that it holds for the same versions "
            "are not tried again.",
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as a page, too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
    json: options.Json = False,
) -> None:
    """Try every causal LM and multimodal class of transformers: build it small, sparsify it, compare.

    A class is complete when each Linear that is called, but the head (of a multimodal model, of its text decoder), is
    sparse in prompt and decode steps, logits at 0 % are the dense model's, and at 50 % those of the model with weak
    channels zeroed by hooks; with every cache and rotary embedding it takes. How many graphs torch.compile makes of it
    is told too. Exit code 1 if a type that was asked for by name is not complete.
    """
    if markdown is not None:
        check_output(markdown, force)
    from was_fx.coverage.cover import candidates
    from was_fx.coverage.sweep import sweep, versions

    known = candidates()
    _check(types or (), known)
    wanted = types or [name for name, reason in known.items() if reason is None]
    left_out = {} if types else {name: reason for name, reason in known.items() if reason is not None}
    with progress(f"Covering {len(wanted)} model types") as advance:
        rows = list(sweep(wanted, timeout=timeout, graphs=graphs, record=record, progress=advance))
    if markdown is not None:
        from was_fx.schedules.files.atomic import write_atomically

        write_atomically(markdown, page(rows, left_out, versions(), graphs=graphs))
    complete = sum(row.complete for row in rows)
    if json:
        entries = [{**dataclasses.asdict(row), "complete": row.complete} for row in rows]
        print_json({"versions": versions(), "complete": complete, "types": entries, "left_out": left_out})
    else:
        _show(rows, left_out)
    if types and complete < len(rows):
        raise typer.Exit(1)


def _check(types: Sequence[str], known: dict[str, str | None]) -> None:
    from was_fx.schedules.names import suggestion

    for name in types:
        if name not in known:
            raise typer.BadParameter(
                f"transformers has no causal LM or multimodal model of type {name!r}{suggestion(name, known)}"
            )


def _show(rows: "Sequence[Coverage]", left_out: dict[str, str]) -> None:
    table = new_table("model type", "ok", "Linears", "sparse", "declined", "bytes", "graphs", "0 %", "50 %")
    table.columns[0].min_width = 16
    for row in rows:
        *first, _, prompt, decode, _, exact, oracle, _ = cells(row)
        table.add_row(*first, f"{prompt}+{decode}", exact, oracle)
    stdout().print(table)
    for row in rows:
        if notes(row):
            say(f"{row.model_type}: {notes(row)}")
    say(f"{sum(row.complete for row in rows)} of {len(rows)} complete", style="bold")
    if left_out:
        say(f"{len(left_out)} types are left out, since they don't decode text from left to right")

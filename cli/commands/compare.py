"""`was compare`: schedules side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from was_fx.cli.input import options
from was_fx.cli.input.compare_inputs import Compared, Results, Trials, read_results, read_schedule, read_trials
from was_fx.cli.input.files import check_output
from was_fx.cli.render.compare_plot import draw
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.grid import share_labels
from was_fx.cli.render.tables import heat, new_table, percent

EXAMPLES = options.examples(
    "was compare s50.was.safetensors s60.was.safetensors",
    "was compare was-llama-2-7b-60 was-llama-2-7b-75  [dim]published ones, by name[/]",
    "was ppl embedded --schedule a.safetensors --schedule b.safetensors --json > ppl.json",
    "was compare a.safetensors b.safetensors --ppl ppl.json --plot compare.svg",
    "was compare --history search.jsonl --plot search.png",
)
PICTURES = (".png", ".svg", ".pdf")


def compare(
    schedules: Annotated[
        list[str] | None, typer.Argument(metavar="[SCHEDULE]...", help="Files, or names of `was published list`.")
    ] = None,
    ppl: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What `was ppl --json` printed for them; several files add up."),
    ] = None,
    history: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The trials of a search (JSON lines); may be given several times."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it too: a file that ends in .png, .svg or .pdf.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Compare schedules: sparsity by projection and by block, perplexity against bytes saved, search history.

    Sparsities are means weighted by the number of weights. Needs no model: perplexities come from
    [bold]was ppl --json[/], a search's trials from its file.
    """
    if not schedules and not history:
        raise typer.BadParameter("give at least one schedule or --history", param_hint="'[SCHEDULE]...'")
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise typer.BadParameter(f"{plot} must end in {', '.join(PICTURES)}", param_hint="'--plot'")
        check_output(plot, force)
    results = read_results(ppl or [])
    searches = [read_trials(path) for path in history or []]
    compared = [read_schedule(name, results) for name in schedules or []]
    if plot is not None:
        with progress(f"Drawing {plot}"):
            draw(plot, compared, results, searches)
    if json:
        print_json(_as_json(compared, results, searches, plot))
        return
    console = stdout()
    if compared:
        _show_summary(console, compared)
        if results is not None:
            _show_results(console, compared, results)
        _show_shares(console, "projection", [each.projections for each in compared])
        _show_shares(console, "block", [each.blocks for each in compared])
    if searches:
        _show_searches(console, searches)
    if plot is not None:
        say(f"Wrote {plot}")


def _show_summary(console: Console, compared: Sequence[Compared]) -> None:
    table = new_table("#", "schedule", "recipe", "target", "nominal", texts=3)
    for number, each in enumerate(compared, start=1):
        target = each.schedule.metadata.target
        table.add_row(
            str(number),
            each.name,
            each.schedule.metadata.recipe,
            "–" if target is None else percent(target),
            percent(each.schedule.sparsity),
        )
    console.print(table)


def _show_results(console: Console, compared: Sequence[Compared], results: Results) -> None:
    setting = results.setting
    say(f"Perplexity of {setting['model']} on {setting['text']}, windows of {setting['length']}", style="bold")
    table = new_table("#", "perplexity", "nominal", "realised", "bytes saved")
    rows = [(f"#{number}", each.measured) for number, each in enumerate(compared, start=1)]
    for label, row in [("dense", results.dense), *rows]:
        if row is None:
            table.add_row(label, *["–"] * 4)
        else:
            shares = [percent(share) for share in (row.nominal, row.realised, row.bytes_saved)]
            table.add_row(label, f"{row.perplexity:.2f}", *shares)
    console.print(table)


def _show_shares(console: Console, what: str, shares: Sequence[Mapping[str, float]]) -> None:
    """A table of sparsities in %, one row per block or projection and one column per schedule, as many as fit."""
    labels = share_labels(what, shares)
    room = max(1, (console.width - max(map(len, [what, *labels.values()]), default=0) - 2) // 8)
    for start in range(0, len(shares), room):
        group = shares[start : start + room]
        table = new_table(what, *(f"#{number}" for number in range(start + 1, start + len(group) + 1)))
        for key, label in labels.items():
            cells = [heat(f"{100 * each[key]:5.1f}", each[key]) if key in each else "·" for each in group]
            table.add_row(label, *cells)
        console.print(table)


def _show_searches(console: Console, searches: Sequence[Trials]) -> None:
    table = new_table("search", "target", "trials", "first loss", "best loss", "at trial")
    for each in searches:
        index, loss = each.best
        target = "–" if each.target is None else percent(each.target)
        first = next(f"{loss:.4f}" for loss in each.losses if math.isfinite(loss))
        table.add_row(str(each.path), target, str(len(each.losses)), first, f"{loss:.4f}", str(index))
    console.print(table)


def _as_json(
    compared: Sequence[Compared], results: Results | None, searches: Sequence[Trials], plot: Path | None
) -> dict[str, Any]:
    schedules = [
        {
            "schedule": each.name,
            "recipe": each.schedule.metadata.recipe,
            "target": each.schedule.metadata.target,
            "nominal": each.schedule.sparsity,
            "measured": each.measured and asdict(each.measured),
            "projections": dict(each.projections),
            "blocks": dict(each.blocks),
        }
        for each in compared
    ]
    trials = [
        {
            "path": str(each.path),
            "target": each.target,
            "trials": len(each.losses),
            "best": dict(zip(("index", "loss"), each.best, strict=True)),
        }
        for each in searches
    ]
    return {
        "setting": None if results is None else dict(results.setting),
        "dense": results and results.dense and asdict(results.dense),
        "schedules": schedules,
        "searches": trials,
        "plot": None if plot is None else str(plot),
    }

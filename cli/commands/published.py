"""`was published`: the schedules that WAS and TEAL published, which come with was-fx."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import check_output
from was_fx.cli.render.console import print_json, say, stdout
from was_fx.cli.render.contents import schedule_json, show_schedule
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx import Schedule

HELP = (
    "Schedules that others published for models of 7 and 8 billion parameters, ready to use. The level they name is "
    "by their own count of parameters; the one by true counts stands beside it."
)
LIST_EXAMPLES = options.examples("was published list", "was published list --json")
SHOW_EXAMPLES = options.examples(
    "was published show was-llama-2-7b-60",
    "was published show teal-mistral-7b-50 --thresholds",
)
EXPORT_EXAMPLES = options.examples(
    "was published export was-llama-2-7b-60",
    "was published export was-mistral-7b-75 --out mistral.was.safetensors",
    "was generate meta-llama/Llama-2-7b-hf --schedule was-llama-2-7b-60 --prompt Hello  [dim]use it[/]",
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name of `was published list`.")]


def list_published(json: options.Json = False) -> None:
    """List the published schedules: their model, the level they name, and what it is by true counts."""
    from was_fx.schedules.released.published import load_published, published_names

    found = {name: load_published(name) for name in published_names()}
    if json:
        print_json({"schedules": [_summary(name, schedule) for name, schedule in found.items()]})
        return
    table = new_table("name", "model", "published", "true counts", texts=2)
    for name, schedule in found.items():
        source = schedule.metadata.source
        table.add_row(name, source["model"], f"{100 * source['level']:g} %", percent(schedule.sparsity))
    stdout().print(table)


def show_published(
    name: Name,
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="Its thresholds τ, in score units, instead of sparsities.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show a published schedule as `was inspect` shows a file."""
    from was_fx import load_published

    schedule = load_published(name)
    if json:
        print_json({**_summary(name, schedule), **schedule_json(name, schedule)})
    else:
        show_schedule(stdout(), name, schedule, thresholds=thresholds)


def export_published(
    name: Name,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to write it.", show_default="NAME.safetensors"),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a published schedule as a file, for every command and function that takes one."""
    from was_fx import load_published

    schedule = load_published(name)
    out = out or Path(f"{name}.safetensors")
    check_output(out, force)
    schedule.save(out)
    if json:
        print_json({"path": str(out), **_summary(name, schedule)})
        return
    model = shlex.quote(schedule.metadata.source["model"])
    say(f"Wrote {out}: {100 * schedule.sparsity:.1f} % by true counts")
    say(f"Next: was generate {model} --schedule {shlex.quote(str(out))}")


def _summary(name: str, schedule: "Schedule") -> dict[str, Any]:
    return {"name": name, **schedule.metadata.source, "nominal": schedule.sparsity, "linears": len(schedule.linears)}

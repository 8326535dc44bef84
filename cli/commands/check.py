"""`was check`: is every scheduled Linear really sparse, on the path that generate() takes, and by what kernel?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import load_model, lowering_name
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx.measure.check import CheckReport

EXAMPLES = options.examples(
    "was check ./llama --schedule llama.was.safetensors",
    "was check ./llama-sparse  [dim]a checkpoint that was saved sparsified[/]",
    "was check ./llama --schedule llama.was.safetensors --sequences 4  [dim]as a server steps[/]",
    "was check embedded --schedule s.was.safetensors --json",
)


def check(
    model: options.Model,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", "-s", metavar="FILE", help="A schedule; none for a checkpoint that has its own."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 8,
    sequences: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that decode together.")] = 1,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Generate a few tokens and say, for each scheduled Linear, how sparse it was, what computed it and why.

    The exit code is 1 if a scheduled Linear ran dense.
    """
    for given, option in ((weights, "--weights"), (lowering, "--lowering")):
        if given and schedule is None:
            raise typer.BadParameter("give the schedule too, with --schedule", param_hint=f"'{option}'")
    decoding = lowering_name(lowering, device, counted=True)
    found = load_schedule(schedule) if schedule else None
    loaded = load_model(model, dtype, device, weights=weights, tokenizer=False, keep_schedule=schedule is None).model
    import was_fx

    if found is not None:
        was_fx.sparsify(loaded, found, lowering=decoding)
    with progress("Generating"):
        report = was_fx.check(loaded, new_tokens=new_tokens, sequences=sequences)
    if json:
        print_json({"model": model, "ok": report.ok, **asdict(report)})
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: "CheckReport") -> None:
    table = new_table("Linear", "nominal", "realised", "computed by")
    for row in report.linears:
        by = "DENSE" if row.dense else row.implementation
        table.add_row(row.name, percent(row.nominal), percent(row.realised), by)
    stdout().print(table)
    reasons = {row.implementation: row.reason for row in report.linears if row.implementation}
    for implementation, reason in reasons.items():
        say(f"{implementation}: {reason}")
    dense, every = sum(row.dense for row in report.linears), len(report.linears)
    say(f"{report.steps} decode steps on {report.device}, {report.path}")
    say(f"{percent(report.realised)} realised, {percent(report.bytes_saved)} of all weight bytes not read")
    for note in report.notes:
        say(f"Note: {note}")
    verdict = f"{dense} of {every} scheduled Linears ran dense" if dense else "Every scheduled Linear is sparse"
    say(verdict, style="bold red" if dense else "bold green")

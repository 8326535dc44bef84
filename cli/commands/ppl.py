"""`was ppl`: what schedules cost in perplexity."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import load_model
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx import Evaluation

EXAMPLES = options.examples(
    "was ppl embedded  [dim]the dense model on its test text[/]",
    "was ppl embedded --schedule s50.was.safetensors --schedule s75.was.safetensors",
    "was ppl ./llama --schedule s.was.safetensors --text test.txt --prefill half  [dim]as TEAL measures[/]",
    "was ppl ./llama --weights int8 --schedule s8.was.safetensors --text test.txt  [dim]quantised when loaded[/]",
)


def ppl(
    model: options.Model,
    schedule: options.Schedules = None,
    text: options.Text = None,
    prefill: options.PrefillOption = options.Prefill.sparse,
    length: options.Length = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Score at most so many windows.")] = None,
    batch_size: options.BatchSize = 4,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    json: options.Json = False,
) -> None:
    """Compare the perplexity of a model, dense and with schedules, on a text.

    Use a text that the calibration has not seen. Nominal sparsity is what the schedule promises, realised what this
    text gave; the bytes are a share of all weights that a token reads, the head's included.
    """

    paths = schedule or []
    source = read_text(text, model, "test")
    schedules = [load_schedule(path) for path in paths]

    loaded = load_model(model, dtype, device, weights=weights)
    ids = windows(loaded, source, length=length, limit=limit)
    arguments: dict[str, Any] = {"prefill": prefill.value, "batch_size": batch_size}
    results: list[tuple[Path | None, Evaluation]] = []
    for path, each in zip([None, *paths], [None, *schedules], strict=True):
        label = "dense" if path is None else str(path)
        if each is not None:
            was_fx.sparsify(loaded.model, each, allow_other_model=allow_other_model)
        with progress(f"Scoring {label}") as advance:
            results.append((path, was_fx.evaluate(loaded.model, ids, progress=advance, **arguments)))
    if json:
        rows = [{"schedule": str(path) if path else None, **_row(result)} for path, result in results]
        setting = {"model": model, "weights": loaded.weights, "text": source.name, "prefill": prefill.value}
        print_json({**setting, "length": ids.shape[1], "results": rows})
        return
    scored = f"{results[0][1].tokens:,} tokens in windows of {ids.shape[1]}"
    named = model if loaded.weights is None else f"{model}, {loaded.weights},"
    _show(results, f"{named} on {source.name}: {scored}, prefill {prefill.value}")


def _row(result: "Evaluation") -> dict[str, Any]:
    return {**asdict(result), "perplexity": result.perplexity}


def _show(results: "list[tuple[Path | None, Evaluation]]", title: str) -> None:
    table = new_table("schedule", "perplexity", "nominal", "realised", "bytes saved")
    for path, result in results:
        shares = [percent(s) if path else "–" for s in (result.nominal, result.realised, result.bytes_saved)]
        table.add_row(str(path or "dense"), f"{result.perplexity:.2f}", *shares)
    say(title, style="bold")
    stdout().print(table)

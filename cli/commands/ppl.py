"""`was ppl`: what schedules cost in perplexity."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.datasets import read_dataset
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import Loaded, load_model
from was_fx.cli.input.texts import read_text, sequences, windows
from was_fx.cli.render.console import note, print_json, progress, say, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx import Evaluation
    from was_fx.measure.conventions import Convention

EXAMPLES = options.examples(
    "was ppl embedded  [dim]the dense model on its test text[/]",
    "was ppl embedded --schedule s50.was.safetensors --schedule s75.was.safetensors",
    "was ppl ./llama --schedule s.was.safetensors --dataset wikitext2  [dim]as WAS's tables: blocks of 2048[/]",
    "was ppl ./llama --schedule s.was.safetensors --dataset wikitext2 --convention teal  [dim]as TEAL's: sliding[/]",
    "was ppl ./llama --dataset c4=c4-validation.00000-of-00008.json.gz  [dim]a local copy, offline[/]",
    "was ppl ./llama --weights int8 --schedule s8.was.safetensors --text test.txt  [dim]quantised when loaded[/]",
)


def ppl(
    model: options.Model,
    schedule: options.Schedules = None,
    text: options.Text = None,
    dataset: options.Dataset = None,
    convention: options.ConventionOption = None,
    prefill: Annotated[
        options.Prefill | None,
        typer.Option(help=f"{options.PREFILL_HELP} By default sparse, or what the convention says."),
    ] = None,
    length: options.Length = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Score at most so many windows or sequences.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Windows per forward pass: more is faster and takes more memory. By default 4; of decode-exact 1.",
        ),
    ] = None,
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
    if dataset is not None and text is not None:
        raise typer.BadParameter("give either a data set or a --text", param_hint="'--dataset'")
    if dataset is not None and convention is None and prefill is None:
        convention = options.Convention.was
    if convention is not None and prefill is not None:
        raise typer.BadParameter(
            f"the convention {convention.value} says already which tokens are sparse; give one of both",
            param_hint="'--prefill'",
        )
    paths = schedule or []
    schedules = [load_schedule(path) for path in paths]
    source = read_text(text, model, "test") if dataset is None else read_dataset(dataset)

    loaded = load_model(model, dtype, device, weights=weights)
    setting: dict[str, Any] = {"model": model, "weights": loaded.weights, "text": source.name}
    if convention is None:
        ids = windows(loaded, source, length=length, limit=limit)
        arguments: dict[str, Any] = {"prefill": (prefill or options.Prefill.sparse).value}
        how = f"in windows of {ids.shape[1]}, prefill {arguments['prefill']}"
    else:
        chosen = fitted(convention, loaded, length)
        ids = sequences(loaded, source, chosen, limit=limit)
        arguments = chosen.arguments
        how = f"by the convention {convention.value}, in sequences of {ids.shape[1]}"
        setting["convention"] = convention.value
    arguments["batch_size"] = batch_size or (1 if arguments.get("decode") else 4)
    results: list[tuple[Path | None, Evaluation]] = []
    for path, each in zip([None, *paths], [None, *schedules], strict=True):
        label = "dense" if path is None else str(path)
        if each is not None:
            was_fx.sparsify(loaded.model, each, allow_other_model=allow_other_model)
        with progress(f"Scoring {label}") as advance:
            results.append((path, was_fx.evaluate(loaded.model, ids, progress=advance, **arguments)))
    if json:
        rows = [{"schedule": str(path) if path else None, **_row(result)} for path, result in results]
        print_json({**setting, "prefill": arguments["prefill"], "length": ids.shape[1], "results": rows})
        return
    named = model if loaded.weights is None else f"{model}, {loaded.weights},"
    _show(results, f"{named} on {source.name}: {results[0][1].tokens:,} tokens {how}")


def fitted(name: options.Convention, loaded: Loaded, length: int | None = None) -> "Convention":
    """A convention for a model: in sequences of `length` where it is given, and no longer than the model takes.

    Raises:
        ValueError: the model takes no sequence of `length`.
    """
    from was_fx.measure.conventions import named

    chosen = named(name.value)
    most = loaded.positions
    if length is not None and most is not None and length > most:
        raise ValueError(f"--length is {length}, but {loaded.name} takes at most {most} tokens")
    found = chosen.fitted(min((n for n in (length, most) if n is not None), default=None))
    if found != chosen:
        note(
            f"Sequences of {found.length} tokens instead of {chosen.length}: perplexities are not those of published "
            "tables, and higher"
        )
    return found


def _row(result: "Evaluation") -> dict[str, Any]:
    return {**asdict(result), "perplexity": result.perplexity}


def _show(results: "list[tuple[Path | None, Evaluation]]", title: str) -> None:
    table = new_table("schedule", "perplexity", "nominal", "realised", "bytes saved")
    for path, result in results:
        shares = [percent(s) if path else "–" for s in (result.nominal, result.realised, result.bytes_saved)]
        table.add_row(str(path or "dense"), f"{result.perplexity:.2f}", *shares)
    say(title, style="bold")
    stdout().print(table)

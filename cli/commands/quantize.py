"""`was quantize`: a checkpoint with weights of int8 or int4."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import check_output_folder
from was_fx.cli.input.models import load_model
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.input.weights import parse_weights, quantise
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.tables import megabytes, new_table, percent

if TYPE_CHECKING:
    from was_fx.sparse.quantize import Quantized

EXAMPLES = options.examples(
    "was quantize ./llama --weights int8 --out llama-int8",
    "was quantize ./llama --weights int4 --text book.txt --out llama-int4  [dim]fitted to a text, much closer[/]",
    "was quantize ./llama --weights int4 --weights '*.down_proj=int8' --out mixed",
    "was calibrate ./llama-int4 --text book.txt  [dim]then as with any checkpoint[/]",
)


def quantize(
    model: options.Model,
    weights: Annotated[list[str], typer.Option(metavar=options.WEIGHTS_METAVAR, help=options.WEIGHT_FORMATS)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="The folder to write: model, tokenizer and configuration."),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Fit int4 to the inputs that this text gives (GPTQ): UTF-8, like what the model will read; or "
            "embedded:calibration. int8 needs none.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Read at most about so many tokens of it (whole windows).")
    ] = 32768,
    length: options.Length = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if was-fx wrote it.")] = False,
    json: options.Json = False,
) -> None:
    """Write a checkpoint whose weights are rows of int8 or int4, which a sparse model skips likewise.

    Without a text each weight is rounded by itself, which takes seconds. With one, channels of int4 are quantised one
    after the other, each making up for the errors of those before: that takes minutes, and loses a fifth to a half of
    the perplexity that int4 loses otherwise, less the more the text is like what the model will read.

    The folder loads with from_pretrained where was_fx is imported, and with every command here. It appears when it is
    complete; an interrupted run leaves nothing.
    """
    from was_fx.modules.quantized_embedding import TIED, embedding_formats
    from was_fx.modules.weights import held_bytes
    from was_fx.schedules.files.atomic import folder_written_atomically

    plan = parse_weights(weights)
    assert plan is not None  # Typer wants at least one
    check_output_folder(out, model, force)
    source = None if text is None else read_text(text, model, "calibration")

    loaded = load_model(model, dtype, device)
    ids = None if source is None else windows(loaded, source, length=length, tokens=tokens)
    before = held_bytes(loaded.model)
    done: list[Quantized] = []
    quantise(loaded.model, model, plan, tokens=ids, told=done.append)
    after = held_bytes(loaded.model)
    with progress(f"Writing {out}"), folder_written_atomically(out) as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    rows = _rows(done, before, after)
    if json:
        found: dict[str, Any] = {"path": str(out), "model": model, "text": None if source is None else source.name}
        found |= {"tokens": 0 if ids is None else ids.numel(), "bytes_before": before, "bytes_after": after}
        print_json({**found, "ratio": after / before, "formats": rows})
        return
    _show(rows, before, after, fitted=ids is not None)
    if TIED in embedding_formats(loaded.model).values():
        say("The input embeddings are tied to the head, and read its codes")
    say(
        f"Wrote {out}"
        + ("" if ids is None or source is None else f", fitted to {ids.numel():,} tokens of {source.name}")
    )
    say(f"Next: was calibrate {shlex.quote(str(out))} --text FILE")


def _rows(done: "Sequence[Quantized]", before: int, after: int) -> list[dict[str, Any]]:
    """One for each format, and one for what stays as it is; errors are relative, of weights and of outputs."""
    rows: list[dict[str, Any]] = []
    for format in dict.fromkeys(each.format for each in done):
        those = [each for each in done if each.format == format]
        weights, outputs = (
            sum(getattr(each, off) for each in those) / size
            if (size := sum(getattr(each, of) for each in those))
            else None
            for off, of in (("off", "size"), ("outputs_off", "outputs_size"))
        )
        row = {"format": format, "weights": len(those), "share": sum(each.before for each in those) / before}
        row |= {"bytes_before": sum(each.before for each in those), "bytes_after": sum(each.after for each in those)}
        errors = {"error": weights, "output_error": outputs}
        rows.append(row | {name: None if found is None else math.sqrt(found) for name, found in errors.items()})
    old, new = (
        whole - sum(row[key] for row in rows) for whole, key in ((before, "bytes_before"), (after, "bytes_after"))
    )
    kept = {"format": "as before", "weights": None, "share": old / before, "bytes_before": old, "bytes_after": new}
    return [*rows, kept | {"error": None, "output_error": None}]


def _show(rows: list[dict[str, Any]], before: int, after: int, *, fitted: bool) -> None:
    table = new_table("format", "weights", "share", "before", "after", "error", *(["of outputs"] if fitted else []))
    for row in rows:
        errors = [row["error"], *([row["output_error"]] if fitted else [])]
        table.add_row(
            row["format"],
            "–" if row["weights"] is None else str(row["weights"]),
            percent(row["share"]),
            megabytes(row["bytes_before"]),
            megabytes(row["bytes_after"]),
            *("–" if error is None else f"{100 * error:.2f} %" for error in errors),
        )
    table.add_row("all", "", percent(1), megabytes(before), megabytes(after), *[""] * (2 if fitted else 1))
    stdout().print(table)
    say(f"The model takes {after / before:.3f} of its memory")

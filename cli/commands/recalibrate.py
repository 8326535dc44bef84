"""`was recalibrate`: thresholds from the model as it runs sparsely."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output, load_schedule
from was_fx.cli.input.models import load_model
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.render.console import print_json, progress, say

EXAMPLES = options.examples(
    "was recalibrate embedded schedule.was.safetensors --out better.was.safetensors",
    "was recalibrate ./llama llama-60.was.safetensors --text book.txt --tokens 20000 --out llama-60r.was.safetensors",
)


def recalibrate(
    model: options.Model,
    schedule: Annotated[Path, typer.Argument(metavar="SCHEDULE", help="The schedule whose sparsities are kept.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the new schedule.")],
    text: options.Text = None,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Measure at most about so many tokens (whole windows) a round.")
    ] = 16384,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often to measure anew.")] = 2,
    length: options.Length = None,
    batch_size: options.BatchSize = 4,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Bring what a model realises to what its schedule says.

    A model that drops channels has other activations than the dense one it was calibrated on, so it drops more or
    less than the schedule's sparsities. This measures them while it drops, and takes each threshold anew.
    """

    check_output(out, force)
    source = read_text(text, model, "calibration")
    before = load_schedule(schedule)

    loaded = load_model(model, dtype, device, weights=weights)
    ids = windows(loaded, source, length=length, tokens=tokens)
    with progress(f"Recalibrating on {ids.numel():,} tokens, {rounds} times") as advance:
        result = was_fx.recalibrate(loaded.model, before, ids, rounds=rounds, batch_size=batch_size, progress=advance)
    result.save(out)
    if json:
        print_json({"path": str(out), "nominal": result.sparsity, "tokens": ids.numel(), "rounds": rounds})
        return
    say(f"Wrote {out}: {len(result.linears)} Linears at {100 * result.sparsity:.1f} %")
    say(f"Next: was ppl {shlex.quote(model)} --schedule {shlex.quote(str(out))}")

"""`was tune`: measure the GPU kernels' tile sizes for a model's shapes on this GPU."""

from typing import Annotated

import typer

from was_fx.cli.input import options
from was_fx.cli.input.models import check_name, load_config, torch_dtype
from was_fx.cli.input.weights import parse_weights
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.tables import new_table

EXAMPLES = options.examples(
    "was tune ./llama",
    "was tune llama-3-8b qwen2.5-7b  [dim]named shapes, without their weights[/]",
    "was tune ./llama --weights int8  [dim]those of quantised weights[/]",
    "was tune ./llama --again  [dim]measure anew what is known[/]",
)


def tune(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Directories or Hub names of causal LMs (only their configuration is read), or names of shapes such "
            "as llama-3-8b.",
        ),
    ],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar=options.WEIGHTS_METAVAR,
            help="Tune the product of quantised weights. Formats as for the other commands; int4 with any group has "
            "the same tile sizes.",
        ),
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    again: Annotated[bool, typer.Option("--again", help="Measure shapes anew that are known.")] = False,
    json: options.Json = False,
) -> None:
    """Find the fastest tile sizes of the sparse product for every shape of a model, on this GPU.

    A few seconds per shape. The results are kept in a file in your cache folder that was-fx reads from then on, before
    the ones it ships for some GPUs. An interrupted run goes on where it stopped.
    """
    plan = parse_weights(weights)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; tile sizes are tuned on the GPU that will use them")
    from was_fx.kernels.parts.gemv_config import tuned
    from was_fx.measure import tuning
    from was_fx.measure.gemv_shapes import gemv_shapes

    number = torch_dtype(options.Dtype.bf16 if dtype is options.Dtype.auto else dtype)
    shapes = []
    with progress("Finding shapes"):
        for name in model:
            shapes += [shape for shape in gemv_shapes(_config(name), number, plan) if shape not in shapes]
    with progress("Tuning") as advance:
        path = tuning.tune(shapes, again=again, progress=advance)
    found = tuned(path.name)
    chosen = {shape.key: vars(found[shape.key]) for shape in shapes}
    if json:
        print_json({"file": str(path), "configurations": chosen})
        return
    table = new_table("K, N, format", "rows", "columns", "splits", "warps")
    for key, config in chosen.items():
        table.add_row(key, *(str(config[name]) for name in ("rows", "columns", "splits", "warps")))
    stdout().print(table)
    say(f"kept in {path}", style="dim")


def _config(name: str) -> object:
    from was_fx.measure.shapes import SHAPES, config

    if name in SHAPES:
        return config(name)
    check_name(name)
    return load_config(name)

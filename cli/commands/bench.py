"""`was bench`: how fast a model decodes, dense and sparse, on this machine."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.models import load_model, lowering_name, torch_device, torch_dtype
from was_fx.cli.input.weights import parse_weights
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx.measure.speed import SpeedRow

EXAMPLES = options.examples(
    "was bench embedded",
    "was bench ./llama --target 50% --target 75%  [dim]a checkpoint[/]",
    "was bench ./llama --weights int8 --target 0% --target 50%  [dim]what int8 wins, and sparsity on top[/]",
    "was bench ./smollm2 --weights int8 --lowering recorded  [dim]steps without Python, on a CPU[/]",
    "was bench llama-3-8b  [dim]shapes with random weights: llama-3-8b, llama-3.2-1b, llama-2-13b, mistral-7b, "
    "qwen2.5-7b[/]",
)


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory or Hub name of a causal LM, [bold]embedded[/], or the name of a shape with random weights.",
        ),
    ],
    target: Annotated[
        list[str] | None, typer.Option(metavar="SHARE", help="Model sparsity, such as 50% (default: 50% and 75%).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=25, metavar="N", help="New tokens per repetition.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, metavar="N", help="How often each is timed.")] = 5,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Time greedy decoding of one sequence, dense and at uniform sparsities, in turns.

    The text is random, and thresholds are read off the model's own activations: this is about speed, not quality. On a
    GPU the cache is static and decode steps are CUDA graphs, dense and sparse; the speed-up is that of a step. On a CPU
    the cache is dynamic, the dense model is compiled, and the sparse one runs eagerly, as it does after `sparsify`;
    with --lowering recorded its cache is static.
    With --weights the sparse model is quantised and the dense one is not; --target 0% is quantised alone.
    """
    from was_fx.measure.speed import decode_speed

    decoding = lowering_name(lowering, device)
    targets = [options.parse_share(each) for each in target or ["50%", "75%"]]
    plan = parse_weights(weights)
    loaded = _model(model, dtype, device)
    with progress("Compiling, then timing in turns") as advance:
        rows = decode_speed(
            loaded,
            targets,
            tokens=tokens,
            repetitions=repetitions,
            lowering=decoding,
            weights=plan,
            progress=advance,
        )
    if json:
        print_json({"model": model, "weights": weights, "lowering": decoding, "rows": [asdict(row) for row in rows]})
        return
    _show(model if not weights else f"{model}, weights {' '.join(weights)}", rows)


def _model(name: str, dtype: options.Dtype, device: str) -> Any:
    from was_fx.measure.shapes import SHAPES, config

    if name not in SHAPES:
        return load_model(name, dtype, device).model
    from was_fx.measure.speed import random_model

    number = torch_dtype(options.Dtype.bf16 if dtype is options.Dtype.auto else dtype)
    with progress(f"Making {name} with random weights"):
        return random_model(config(name), dtype=number, device=str(torch_device(device)))


def _show(model: str, rows: "list[SpeedRow]") -> None:
    steps = any(row.step_ms is not None for row in rows)
    times = ("ms/step", "ms/token") if steps else ("ms/token",)
    table = new_table("target", "realised", *times, "speed-up", "GB read/token", "GB/s")
    for index, row in enumerate(rows):
        table.add_row(
            percent(row.target) if index else "dense",
            percent(row.realised) if index else "–",
            *([f"{row.step_ms:.2f}"] if steps else []),
            f"{row.ms_per_token:.2f}",
            f"{row.ratio:.2f}×",
            f"{row.bytes_per_token / 1e9:.2f}",
            f"{row.bytes_per_token / row.ms / 1e6:.0f}",
        )
    dense, sparse = rows[0], rows[1]
    say(f"{model}, decode, batch 1", style="bold")
    stdout().print(table)
    say(
        f"ms/token is that of generate(). A prompt of {dense.prompt_tokens} tokens: dense {dense.prompt_ms:.0f} ms, "
        f"sparse {sparse.prompt_ms:.0f} ms. First generate(): dense {dense.first_generate_s:.1f} s, "
        f"sparse {sparse.first_generate_s:.1f} s.",
        style="dim",
    )

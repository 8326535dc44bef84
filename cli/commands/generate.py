"""`was generate`: text from a model, dense or with a schedule."""

from pathlib import Path
from typing import Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import Loaded, load_model, lowering_name
from was_fx.cli.input.prompts import continuation, prompt_tokens
from was_fx.cli.input.weights import parse_weights
from was_fx.cli.render.console import note, print_json, stdout

EXAMPLES = options.examples(
    'was generate embedded --prompt "It was a dark night"  [dim]dense[/]',
    'was generate embedded --schedule s.was.safetensors --prompt "It was" --sample --temperature 0.8 --seed 3',
    'was generate ./llama --schedule s.was.safetensors --prompt "Hello" --dense-too',
    'was generate ./llama --schedule s.was.safetensors --prompt "Hello" --lowering recorded  '
    "[dim]fastest for a small model on a CPU[/]",
    'was generate ./llama --schedule s.was.safetensors --prompt "Hello" --draft --draft-weights int4  '
    "[dim]the dense model's own text[/]",
)


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", "-s", metavar="FILE", help="A schedule; without one, the model is dense."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float, typer.Option(min=0.01, metavar="T", help="With --sample: lower is more predictable.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="With --sample: the same seed gives the same text.")] = 0,
    dense_too: Annotated[bool, typer.Option("--dense-too", help="The dense model's text first, to compare.")] = False,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Write the dense model's own text: by the schedule a draft guesses some tokens, which one step of the "
            "dense model then checks.",
        ),
    ] = False,
    guesses: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --draft: tokens that are guessed before they are checked.")
    ] = 5,
    draft_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar=options.WEIGHTS_METAVAR,
            help="With --draft: quantise the draft's weights, and not those of the model that checks; formats as for "
            "--weights. By default both have the same.",
        ),
    ] = None,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    json: options.Json = False,
) -> None:
    """Generate text, token by token, on stdout.

    The prompt is read densely; each new token is sparse. On a GPU the first ones wait for the compiler.
    """
    if lowering and schedule is None:
        raise typer.BadParameter("give a schedule too, with --schedule", param_hint="'--lowering'")
    if draft and schedule is None:
        raise typer.BadParameter("give the schedule of the draft, with --schedule", param_hint="'--draft'")
    if draft_weights and not draft:
        raise typer.BadParameter("is for --draft; --weights are the model's own", param_hint="'--draft-weights'")
    formats = parse_weights(draft_weights, "--draft-weights")
    decoding = lowering_name(lowering, device)
    found = load_schedule(schedule) if schedule else None
    if not prompt:
        raise typer.BadParameter("the prompt is empty", param_hint="'--prompt'")

    loaded = load_model(model, dtype, device, weights=weights)
    prompt_tokens(loaded, prompt, max_new_tokens)  # says what is wrong before anything is printed
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    how["temperature"] = temperature if sample else None
    runs: dict[str, dict[str, Any]] = {}
    headings = dense_too and found is not None and not json
    if dense_too or found is None:
        runs["dense"] = _stream(loaded, prompt, how, heading="dense" if headings else None, quiet=json)
    if found is not None and draft:
        how["draft"] = was_fx.draft(
            loaded.model,
            found,
            tokens=guesses,
            weights=formats,
            lowering=decoding,
            allow_other_model=allow_other_model,
        )
        heading = f"dense, with a draft of {100 * found.sparsity:.0f} % nominal" if headings else None
        runs["drafted"] = _stream(loaded, prompt, how, heading=heading, quiet=json)
    elif found is not None:
        was_fx.sparsify(
            loaded.model,
            found,
            lowering=decoding,
            allow_other_model=allow_other_model,
        )
        heading = f"sparse, {100 * found.sparsity:.0f} % nominal" if headings else None
        runs["sparse"] = _stream(loaded, prompt, how, heading=heading, quiet=json)
    if json:
        main = list(runs.values())[-1]
        other = {"dense": runs["dense"]} if dense_too and found is not None else {}
        print_json({"prompt": prompt, "schedule": str(schedule) if schedule else None, **main, **other})


def _stream(loaded: Loaded, prompt: str, how: dict[str, Any], *, heading: str | None, quiet: bool) -> dict[str, Any]:
    """Generate, and print text as it comes unless `quiet`; what `continuation` gives."""
    from transformers import TextStreamer

    console = stdout()
    if heading:
        console.rule(heading, align="left")
    if not quiet:
        console.print(prompt, style="bold", end="", soft_wrap=True)
    printer = None if quiet else TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = continuation(loaded, prompt, printer=printer, **how)
    if not quiet:
        took = result["ms_per_token"]
        speed = f", {took:.1f} ms per token ({'mean' if 'draft' in how else 'median'})" if took is not None else ""
        kept = result.get("accepted_share")
        guessed = "" if kept is None else f", {100 * kept:.0f} % of the guesses kept"
        note(f"{result['tokens']} tokens{speed}{guessed}")
    return result

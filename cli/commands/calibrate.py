"""`was calibrate`: measure a model's activations on a text, or on images."""

import shlex
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output
from was_fx.cli.input.models import load_model, load_processor
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.render.console import print_json, progress, say
from was_fx.cli.render.search_progress import SearchDisplay

if TYPE_CHECKING:
    from was_fx import Score
    from was_fx.cli.input.models import Loaded

EXAMPLES = options.examples(
    "was calibrate embedded  [dim]the model inside was-fx, on its own text[/]",
    "was calibrate ./llama --text book.txt --out llama.calibration.safetensors",
    "was calibrate ./llama --text book.txt --score teal --tokens 100000",
    "was calibrate ./llama --text book.txt --include '*' --exclude '*.k_proj'  [dim]the head too, k not[/]",
    "was calibrate ./llama --text book.txt --exponent 0.5 --norm 2",
    "was calibrate ./llama --text book.txt --fisher  [dim]for was make --fisher, at any target[/]",
    "was calibrate ./llama --text book.txt --fisher --correct  [dim]longer, and loses less[/]",
    "was calibrate ./llama --text book.txt --weights int8  [dim]as it will run, quantised[/]",
    "was calibrate ./llava --images photos  [dim]a multimodal model, on images with captions beside them[/]",
)


# The scores of published methods.
ScoreName = StrEnum("ScoreName", ["was", "teal", "wina"])


def calibrate(
    model: options.Model,
    text: options.Text = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE",
            help="Images for a multimodal model, instead of a text or with it. A folder, where NAME.txt holds what the "
            "model should say of NAME.png; or JSON lines with image, prompt and answer.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the calibration.")] = Path(
        "calibration.safetensors"
    ),
    score: Annotated[
        ScoreName | None,
        typer.Option(
            help="What decides whether channel j counts. was: |x_j| times the 1-norm of its weights. teal: |x_j|. "
            "wina: |x_j| times their 2-norm. By default was."
        ),
    ] = None,
    exponent: Annotated[
        float | None, typer.Option(min=0, metavar="A", help="Your own score instead: |x_j| · ‖W_j‖^A.")
    ] = None,
    norm: Annotated[
        int | None, typer.Option(min=1, max=2, metavar="P", help="Which norm of the weights --exponent uses, 1 or 2.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Measure at most about so many tokens (whole windows) of the text, and of the images; by default all.",
        ),
    ] = None,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher",
            help="Measure by a backward pass how much the loss moves with each channel, for the recipe fisher.",
        ),
    ] = False,
    correct: Annotated[
        bool,
        typer.Option(
            "--correct",
            help="With --fisher: correct its weights by what channels cost in the model that drops half of them. Takes "
            "longer than all the rest, seconds on a GPU; any target then loses less.",
        ),
    ] = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    length: options.Length = None,
    batch_size: options.BatchSize = 4,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure the activations of a model on a text, or on images: once per model and score.

    The result holds, for each Linear, the threshold of each sparsity. [bold]was make[/] turns it into schedules.
    """

    chosen = _score(score, exponent, norm)
    if correct and (not fisher or images is not None):
        found = "--images" if fisher else "no --fisher"
        raise typer.BadParameter(
            f"it corrects what --fisher measures on a text, found {found}", param_hint="'--correct'"
        )
    check_output(out, force)

    from was_fx.modules.linears import dense_expert_parameters, dense_expert_share, outside_decoder

    how = {"dtype": dtype, "device": device, "weights": weights}
    loaded, given, name = _model_and_input(model, text, images, length, tokens, how)
    count = f"{len(given)} texts and images" if images else f"{given.numel():,} tokens"
    with progress(f"Calibrating on {count}") as advance:
        result = was_fx.calibrate(
            loaded.model,
            given,
            score=chosen,
            text=name,
            include=include or None,
            exclude=exclude or (),
            fisher=fisher,
            batch_size=batch_size,
            progress=advance,
        )
    if correct:
        with SearchDisplay() as display:
            result = was_fx.correct_fisher(
                loaded.model, result, tokens=given, batch_size=batch_size, progress=display.update
            )
    result.save(out)
    outside, share = outside_decoder(loaded.model)
    if json:
        score_used = {"exponent": chosen.exponent, "norm": chosen.norm}
        linears = len(result.thresholds)
        print_json(
            {
                "path": str(out),
                "linears": linears,
                "tokens": result.tokens,
                "text": name,
                "score": score_used,
                "weights": loaded.weights,
                "fisher": fisher,
                "corrected": correct,
                "pooled": list(result.pooled),
                "excluded": list(result.excluded),
                "excluded_share": _excluded_share(loaded.model, result.excluded),
                "outside": {"linears": len(outside), "share": share},
            }
        )
        return
    say(f"Wrote {out}: {len(result.thresholds)} Linears, {result.tokens:,} tokens of {name}, score {chosen}")
    if result.pooled:
        say(
            f"{len(result.pooled)} of the matrices are experts' that saw fewer than 32 tokens, such as "
            f"{result.pooled[0]}; they have the thresholds of all experts of their block together. More text helps"
        )
    if outside:
        say(
            f"{len(outside)} Linears outside of the text decoder are left out, such as {outside[0]}: they run once in "
            f"a prompt. What lies there is {100 * share:.0f} % of the model's bytes, and no decode step reads it"
        )
    if result.excluded:
        say(
            f"{len(result.excluded)} Linears of the decoder stay dense, such as {result.excluded[0]}: "
            f"{100 * _excluded_share(loaded.model, result.excluded):.1f} % of the bytes of a token"
        )
    experts = dense_expert_parameters(loaded.model)
    if experts:
        say(
            f"Weights held as 3-D parameters stay dense: {len(experts)}, such as {next(iter(experts))}, "
            f"{100 * dense_expert_share(loaded.model):.0f} % of the bytes of a token"
        )
    if loaded.weights is not None:
        say(f"Weights: {loaded.weights}; use it with weights in the same formats")
    say(f"Next: was make {shlex.quote(str(out))} --target 50%{' --fisher' if fisher else ''}")


def _model_and_input(
    model: str, text: str | None, images: Path | None, length: int | None, tokens: int | None, how: dict[str, Any]
) -> "tuple[Loaded, Any, str]":
    """The model, what `was_fx.calibrate` takes as tokens, and what that is called."""
    if images is None:
        source = read_text(text, model, "calibration")
        loaded = load_model(model, **how)
        return loaded, windows(loaded, source, length=length, tokens=tokens), source.name
    from was_fx.cli.input.images import Conversations, read_examples

    examples = read_examples(images)
    words = None if text is None else read_text(text, model, "calibration")
    processor = load_processor(model)
    loaded = load_model(model, **how, tokenizer=words is not None, whole=True)
    shown = Conversations(loaded, processor, examples)
    shown = shown if tokens is None else shown.within(tokens)
    if words is None:
        return loaded, shown, str(images)
    return loaded, shown.after(windows(loaded, words, length=length, tokens=tokens)), f"{words.name} and {images}"


def _excluded_share(model: Any, names: Collection[str]) -> float:
    from was_fx.modules.linears import byte_share, find_linears

    return byte_share(model, [linear for name, linear in find_linears(model).items() if name in names])


def _score(name: ScoreName | None, exponent: float | None, norm: int | None) -> "Score":
    if name is not None and (exponent is not None or norm is not None):
        raise typer.BadParameter("give either a name, or --exponent and --norm", param_hint="'--score'")
    from was_fx import Score

    if exponent is None and norm is None:
        return Score.named((name or ScoreName.was).value)
    return Score(1.0 if exponent is None else exponent, norm or 1)

"""`was recommend`: how much sparsity a model takes."""

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.commands.compare import PICTURES
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output
from was_fx.cli.input.models import load_model
from was_fx.cli.input.texts import read_text, spread_windows
from was_fx.cli.render.console import print_json, progress, say, stdout
from was_fx.cli.render.recommend_plot import draw
from was_fx.cli.render.search_progress import SearchDisplay
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx.searching.recommendation import Point, Recommendation

EXAMPLES = options.examples(
    "was recommend embedded --loss 2%  [dim]on the model inside was-fx[/]",
    "was recommend ./llama --text mine.txt --loss 1% --plot curve.png",
    "was recommend ./llama --text mine.txt --weights bf16 --weights int8 --weights int4  [dim]and which format[/]",
    "was recommend ./llama --text mine.txt --loss 3% --log mine.jsonl --resume  [dim]after --loss 1% or a kill[/]",
)


def parse_loss(text: str) -> float:
    """Nats per token from `1%` of perplexity, or from nats such as `0.01`."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give 1% of perplexity, or nats such as 0.01") from None
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is not above 0; give 1% of perplexity, or nats such as 0.01")
    return math.log1p(value / 100) if number.endswith("%") else value


def recommend(
    model: options.Model,
    text: options.Text = None,
    loss: Annotated[
        float,
        typer.Option(
            parser=parse_loss,
            metavar="SHARE",
            help="What you allow: so much more perplexity than the dense model has, such as 1%; or nats per token, "
            "such as 0.01.",
        ),
    ] = "1%",  # type: ignore[assignment]  # Typer parses it
    valid: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text to judge on; by default a third of --text, which calibration then does not see.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="A format of weights to try: int8, int4, int4-64, int4-128; none, or bf16 if the model is that, for "
            "its own. May be given several times. By default the model's own alone.",
        ),
    ] = None,
    out: options.ScheduleOut = options.SCHEDULE_OUT,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the loss against bytes and time: .png, .svg or .pdf."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=6,
            metavar="N",
            help="Tokens of text to use in all, spread over it: two thirds to calibrate, a third to judge.",
        ),
    ] = 24576,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure the time per token too.")] = True,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed finds the same.")] = 0,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep each measurement as a JSON line here.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take from --log what it has, whatever --loss and --weights were then.")
    ] = False,
    length: options.Length = None,
    batch_size: options.BatchSize = 4,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find out how much sparsity a model takes: the highest whose loss stays within what you allow.

    The model is calibrated once (recipe fisher, corrected where the model drops half). Then a few sparsities are judged
    on text that calibration has not seen, and timed. Of several formats of weights, the one with the fastest token is
    recommended, and its schedule written.
    """
    if resume and log is None:
        raise typer.BadParameter("give the log to resume from with --log", param_hint="'--resume'")
    check_output(out, force)
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            raise typer.BadParameter(f"{plot} must end in {', '.join(PICTURES)}", param_hint="'--plot'")
        check_output(plot, force)
    source = read_text(text, model, "calibration")
    other = read_text(valid, model, "validation") if valid is not None else None

    loaded = load_model(model, dtype, device)
    share = tokens if other is None else 2 * tokens // 3
    ids = spread_windows(loaded, source, length=length, tokens=share)
    judged = None if other is None else spread_windows(loaded, other, length=length, tokens=tokens - share)
    with SearchDisplay() as display:
        found = was_fx.recommend(
            loaded.model,
            ids,
            validation=judged,
            loss=loss,
            weights=weights,
            speed=speed,
            seed=seed,
            batch_size=batch_size,
            text=source.name,
            log=log,
            resume=resume,
            progress=display.update,
        )
    if found.schedule is not None:
        found.schedule.save(out)
    if plot is not None:
        with progress(f"Drawing {plot}"):
            draw(plot, found)
    if json:
        print_json(_as_json(found, model, out, plot))
        return
    _show(found)
    _advise(found, model, source.name, out)
    if plot is not None:
        say(f"Wrote {plot}")


def _as_json(found: "Recommendation", model: str, out: Path, plot: Path | None) -> dict[str, Any]:
    return {
        "model": model,
        "budget": found.budget,
        "best": asdict(found.best),
        "path": None if found.schedule is None else str(out),
        "choices": [asdict(point) for point in found.choices],
        "points": [asdict(point) for point in found.points],
        "plot": None if plot is None else str(plot),
    }


def _show(found: "Recommendation") -> None:
    say("✓ highest within the budget, → recommended; MB of weights and ms of a token", style="bold")
    table = new_table("weights", "sparsity", "realised", "PPL", "above dense", "MB", "ms")
    for point in found.points:
        mark = "→ " if point == found.best else "✓ " if point in found.choices else "  "
        table.add_row(
            mark + point.weights,
            percent(point.target),
            percent(point.realised),
            f"{math.exp(point.loss):.2f}",
            _above(point),
            f"{point.bytes_per_token / 1e6:,.1f}",
            "" if point.ms_per_token is None else f"{point.ms_per_token:.2f}",
        )
    stdout().print(table)


def _above(point: "Point") -> str:
    """What the loss adds to the perplexity, with its standard error."""
    if point.added == point.error == 0:
        return "–"
    error = "" if math.isnan(point.error) else f" ± {100 * point.error:.2f}"
    return f"{100 * math.expm1(point.added):+.2f}{error} %"


def _advise(found: "Recommendation", model: str, text: str, out: Path) -> None:
    best, first = found.best, found.points[0]
    gains = [f"{first.bytes_per_token / best.bytes_per_token:.2f}× fewer bytes"]
    if best.ms_per_token is not None and first.ms_per_token is not None:
        gains.append(f"{first.ms_per_token / best.ms_per_token:.2f}× as fast")
    than = f"{first.weights} at {percent(first.target)}"
    allowed = f"{100 * math.expm1(found.budget):.3g} % of perplexity"
    say(f"Within {allowed}: weights {best.weights}, sparsity {percent(best.target)}: {', '.join(gains)} as {than}")
    if found.schedule is not None:
        say(f"Wrote {out}")
    for line in _next_steps(found, model, text, out):
        say(line)


def _next_steps(found: "Recommendation", model: str, text: str, out: Path) -> list[str]:
    """Commands that use the answer."""
    best, own = found.best, found.points[0].weights
    lines, name = [], model
    if found.quantised:
        name = f"{Path(model).name}-{best.weights}"
        fitted = "" if best.weights == "int8" else f" --text {shlex.quote(text)}"
        lines.append(
            f"Next: was quantize {shlex.quote(model)} --weights {best.weights}{fitted} --out {shlex.quote(name)}"
        )
    if found.schedule is not None:
        lines.append(f"Next: was generate {shlex.quote(name)} --schedule {shlex.quote(str(out))} --prompt Hello")
    if not found.quantised and {point.weights for point in found.points} == {own}:
        lines.append(f"Weights of int8 cost little: try --weights {own} --weights int8 --weights int4")
    return lines

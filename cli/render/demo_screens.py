"""What `was demo` shows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from was_fx.cli.render.tables import megabytes, new_table, percent
from was_fx.schedules.names import visible

if TYPE_CHECKING:
    from was_fx import Evaluation
    from was_fx.measure.speed import SpeedRow

# What leads from here to a schedule of one's own model, its report, its speed and its text; tests run these commands.
NEXT = (
    ("a schedule that meets 50 %", "was search MODEL --recipe fisher --target 50% --text book.txt"),
    ("what it costs and gains, as a page", "was report MODEL --schedule schedule.was.safetensors --text other.txt"),
    ("how fast it decodes, in int8", "was bench MODEL --weights int8 --target 0% --target 50%"),
    ("decode with it", 'was generate MODEL --schedule schedule.was.safetensors --prompt "Once"'),
)


def opening(console: Console) -> None:
    """What is going to happen."""
    _heading(console, "was-fx")
    _paragraph(
        console,
        "Decoding one token reads every weight of a model once, and that is what it waits for. Where an input is "
        "near zero, its weight column hardly counts: was-fx doesn't read it.",
    )
    _paragraph(
        console,
        "First what that wins, on weights of a usual size; then what it costs, on a language model of 5.8 M parameters "
        "that lies inside this package. Its thresholds come from one text, its perplexity from another.",
    )


def quality(console: Console, found: "Mapping[tuple[str, float], Evaluation]", scores: Sequence[str]) -> None:
    """Perplexity by sparsity, side by side for each score."""
    _heading(console, "2  Quality")
    dense = found["dense", 0.0]
    columns = [f"{what} {score.upper()}" for what in ("realised", "ppl") for score in scores]
    table = new_table("nominal", *columns, "bytes saved")
    table.add_row("dense", *["–"] * len(scores), *[f"{dense.perplexity:.1f}"] * len(scores), "–")
    for level in dict.fromkeys(level for _, level in found if level):
        results = [found[score, level] for score in scores]
        realised = [percent(each.realised) for each in results]
        perplexities = [f"{each.perplexity:.1f}" for each in results]
        table.add_row(f"{100 * level:.0f} %", *realised, *perplexities, percent(results[0].bytes_saved))
    console.print(table)
    _paragraph(
        console,
        f"Perplexity (ppl, lower is better) on {dense.tokens:,} tokens of books that neither training nor "
        "calibration has seen. WAS weighs an input by the weights it meets, TEAL by its size alone. Bytes saved "
        "(WAS) is the share of all weights, the head's included, that a token doesn't read.",
    )
    _paragraph(
        console,
        "A model this small has little to spare: a 7B model loses far less at the same sparsity. These schedules "
        "are uniform, the same sparsity everywhere.",
    )


def better(console: Console, dense: "Evaluation", found: "Mapping[str, tuple[Evaluation, int]]", level: float) -> None:
    """Perplexity and bytes of the recipe `fisher` and of weights of int8."""
    _heading(console, "3  Better: where to drop, and int8")
    labels = {
        "uniform": f"WAS, uniform {100 * level:.0f} %",
        "fisher": f"fisher {100 * level:.0f} %",
        "int8": "int8, dense",
        "int8, fisher": f"int8, fisher {100 * level:.0f} %",
    }
    table = new_table("", "ppl", "weights read per token")
    table.add_row("dense", f"{dense.perplexity:.1f}", megabytes(found["uniform"][1]))
    for name, (result, size) in found.items():
        table.add_row(labels[name], f"{result.perplexity:.1f}", megabytes(size * (1 - result.bytes_saved)))
    console.print(table)
    _paragraph(
        console,
        "The recipe fisher learns by one backward pass which channels the loss needs. Weights of int8 take a byte each "
        "instead of four here (two in most checkpoints), at next to no cost, and a sparse token skips them likewise.",
    )


def samples(console: Console, prompt: str, texts: Mapping[str, str]) -> None:
    """The continuations of one prompt."""
    _heading(console, "4  Text")
    for label, text in (("dense", texts["dense"]), ("sparse, WAS at 50 %", texts["sparse"])):
        console.print(label, style="bold")
        body = Text.assemble((prompt, "bold"), visible(text.rstrip(), keep="\n"))
        console.print(Padding(body, (0, 2, 1, 2)))
    _paragraph(console, "The same random numbers chose the words; the first that differs leads elsewhere.")


def speed(console: Console, rows: "Mapping[str, SpeedRow]", blocks: int) -> None:
    """Milliseconds and bytes per token."""
    _heading(console, "1  Speed")
    table = new_table("nominal", "realised", "ms per token", "speed-up", "weights read per token")
    for name, row in rows.items():
        realised = percent(row.realised) if row.target else "–"
        table.add_row(name, realised, f"{row.ms_per_token:.1f}", f"{row.ratio:.2f} ×", megabytes(row.bytes_per_token))
    console.print(table)
    _paragraph(
        console,
        f"Greedy decoding on this CPU: {blocks} blocks with the shapes of Llama-3.2-1B, random weights of bf16 or "
        f"int8, a vocabulary of 4096. Medians of {len(rows['dense'].repetitions)} runs; dense and sparse took turns, "
        "both as they come, uncompiled. Random weights say nothing about quality, and an idle machine gives steadier "
        "numbers.",
    )


def closing(console: Console) -> None:
    """What to try next."""
    _heading(console, "Next: your own model")
    for what, command in NEXT:
        console.print(f"  {what}", style="dim")
        console.print(f"    {command}", style="cyan")
    console.print()
    _paragraph(
        console,
        "MODEL is a directory or a Hub name, or `embedded`. `was doctor MODEL` says what it would run by here. From "
        "Python: README.md, or help(was_fx.sparsify).",
    )


def _heading(console: Console, text: str) -> None:
    console.print(Rule(Text(text, style="bold"), align="left", style="dim"))


def _paragraph(console: Console, text: str) -> None:
    console.print(text + "\n")

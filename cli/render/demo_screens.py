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


def samples(console: Console, prompt: str, texts: Mapping[str, str]) -> None:
    """The continuations of one prompt."""
    _heading(console, "3  Text")
    for label, text in (("dense", texts["dense"]), ("sparse, WAS at 50 %", texts["sparse"])):
        console.print(label, style="bold")
        body = Text.assemble((prompt, "bold"), visible(text.rstrip(), keep="\n"))
        console.print(Padding(body, (0, 2, 1, 2)))
    _paragraph(console, "The same random numbers chose the words; the first that differs leads elsewhere.")


def speed(console: Console, rows: "Sequence[SpeedRow]", blocks: int) -> None:
    """Milliseconds and bytes per token."""
    _heading(console, "1  Speed")
    table = new_table("nominal", "realised", "ms per token", "speed-up", "weights read per token")
    for index, row in enumerate(rows):
        name = f"{100 * row.target:.0f} %" if index else "dense"
        realised = percent(row.realised) if index else "–"
        table.add_row(name, realised, f"{row.ms_per_token:.1f}", f"{row.ratio:.2f} ×", megabytes(row.bytes_per_token))
    console.print(table)
    _paragraph(
        console,
        f"Greedy decoding on this CPU: {blocks} blocks with the shapes of Llama-3.2-1B, random bf16 weights, a "
        f"vocabulary of 4096. Medians of {len(rows[0].repetitions)} runs; dense and sparse took turns, both as they "
        "come, uncompiled. Random weights say nothing about quality, and an idle machine gives steadier numbers.",
    )


def closing(console: Console) -> None:
    """What to try next."""
    _heading(console, "Next: your own model")
    for command in (
        "was calibrate MODEL --text book.txt",
        "was make calibration.safetensors --target 50%",
        "was inspect schedule.was.safetensors",
        "was ppl MODEL --schedule schedule.was.safetensors --text other.txt",
        'was generate MODEL --schedule schedule.was.safetensors --prompt "Once"',
    ):
        console.print(f"  {command}", style="cyan")
    console.print()
    _paragraph(
        console, "MODEL is a directory or a Hub name, or `embedded`. From Python: README.md, or help(was_fx.sparsify)."
    )


def _heading(console: Console, text: str) -> None:
    console.print(Rule(Text(text, style="bold"), align="left", style="dim"))


def _paragraph(console: Console, text: str) -> None:
    console.print(text + "\n")

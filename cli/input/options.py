"""Options and arguments that several sub-commands share."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EMBEDDED = "embedded"


class Prefill(StrEnum):
    """Which tokens of a window are sparse."""

    sparse = "sparse"
    half = "half"
    all = "all"


class Convention(StrEnum):
    """How a text is cut, scored and made sparse; see `was_fx.measure.conventions`."""

    was = "was"
    teal = "teal"
    all = "all"
    decode_exact = "decode-exact"


class Lowering(StrEnum):
    """What decode steps are run by."""

    inductor = "inductor"
    eager = "eager"
    recorded = "recorded"


class Dtype(StrEnum):
    """The dtype of weights and activations."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def examples(*lines: str) -> str:
    """A command's closing help: commands to copy, each with what it does."""
    return "\n\n".join(["[bold]Examples[/]", *lines])


def parse_names(given: Sequence[str] | None) -> list[str]:
    """The names of an option that takes several at once, with commas between them, and may be given several times."""
    return [name.strip() for each in given or [] for name in each.split(",") if name.strip()]


def parse_share(text: str) -> float:
    """A share of 1 from `0.5` or `50%`, at least 0 and below 1."""
    number = text.strip()
    percent = number.endswith("%")
    try:
        share = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; give a share such as 0.5 or 50%") from None
    if not 0 <= share < 1:
        hint = f"; did you mean {share:g}%?" if not percent and 1 < share < 100 else "; for example 0.5 or 50%"
        raise typer.BadParameter(f"{text!r} is outside 0 ≤ target < 1{hint}")
    return share


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Directory or Hub name of a causal LM, or [bold]embedded[/] for the small model inside was-fx.",
    ),
]
Schedules = Annotated[
    list[Path] | None,
    typer.Option("--schedule", "-s", metavar="FILE", help="A schedule to measure; may be given several times."),
]
ScheduleOrSaved = Annotated[
    Path | None,
    typer.Option(
        "--schedule",
        "-s",
        metavar="FILE",
        help="A schedule; by default the one that the model was saved with, if it was. Without one it is dense.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text file; or embedded:calibration, embedded:validation or embedded:test for a text inside "
        "was-fx. Only the embedded model has a default.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Tokens per window. The text is cut into windows that don't overlap; what fills no window is dropped. "
        "By default 512, or what the model can take if that is less.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, metavar="N", help="Windows per forward pass. More is faster and takes more memory.")
]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[=PATH]",
        help="wikitext2 (its test split) or c4 (the first 1100 texts of its validation split), from the Hugging Face "
        "Hub or, as NAME=PATH, from a local copy; joined as in published tables. Or a text file as it is.",
    ),
]
ConventionOption = Annotated[
    Convention | None,
    typer.Option(
        help="How published tables score a text. was: blocks of 2048, all but the first 1 % sparse. teal: windows of "
        "2560, every 512, whose last 512 are scored and whose last half is sparse. all: blocks of 2048, every token "
        "sparse. decode-exact: as was, but token by token through decode steps, which takes long. By default was for a "
        "--dataset; for a --text its windows and --prefill."
    ),
]
PREFILL_HELP = (
    "Which tokens of a scored text are sparse. sparse: all but the first 1 % (as in WAS). half: the last half (as in "
    "TEAL). all: every one."
)
PrefillOption = Annotated[Prefill, typer.Option(help=PREFILL_HELP)]
WEIGHTS_METAVAR = "FORMAT|PATTERN=FORMAT"
WEIGHT_FORMATS = (
    "[bold]int8[/]: a byte for each weight, hardly any loss. [bold]int4[/]: 4.5 bits; int4-64, int4-128: 4.25, 4.13. "
    "A format alone is for embeddings and all Linears but the head, which becomes int8. PATTERN=FORMAT is for some by "
    "qualified name or glob, such as '*.down_proj=int8' or lm_head=none (which leaves it as it is). May be given "
    "several times; the first pattern that fits counts."
)
Weights = Annotated[
    list[str] | None,
    typer.Option(
        metavar=WEIGHTS_METAVAR,
        help=f"Quantise the model when it is loaded; only was quantize fits int4 to a text. {WEIGHT_FORMATS}",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORMAT[,PATTERN=FORMAT]…",
        help="Measure the model in this format of weights too, beside that of the checkpoint; may be given several "
        "times. int8, int4, int4-64, int4-128, with exceptions as elsewhere: int4,*.down_proj=int8.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Dtype to load the model in. auto: as the checkpoint is stored (the embedded model: fp32)."),
]
Device = Annotated[
    str, typer.Option(metavar="cpu|cuda|auto", help="Device to run on. auto: a CUDA device if there is one.")
]
LoweringOption = Annotated[
    Lowering | None,
    typer.Option(
        help="inductor: decode steps are compiled, which takes a while to start. eager: nothing is compiled. "
        "recorded: on a CPU two steps are recorded and then repeated without Python, the fastest for a small model. By "
        "default inductor on a GPU, eager elsewhere."
    ),
]
OtherModel = Annotated[
    bool,
    typer.Option(
        "--allow-other-model",
        help="Accept a schedule made for another model if all names and shapes fit, for example a fine-tuned one.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Only these Linears: a qualified name, a glob such as '*.mlp.*', or a regular expression after re:. May "
        "be given several times. By default all but the head.",
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Leave these Linears dense; patterns as for --include.")
]
ScheduleOut = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the schedule.")]
SCHEDULE_OUT = Path("schedule.was.safetensors")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")]

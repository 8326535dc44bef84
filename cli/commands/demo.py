"""`was demo`: the whole of was-fx in one run, offline."""

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.models import Loaded, load_model
from was_fx.cli.input.prompts import continuation
from was_fx.cli.render import demo_screens as screens
from was_fx.cli.render.console import print_json, progress, stdout

if TYPE_CHECKING:
    from was_fx import Calibration, Evaluation, Schedule
    from was_fx.measure.speed import SpeedRow

EXAMPLES = options.examples(
    "was demo  [dim]two minutes on two CPU cores[/]",
    "was demo --fast  [dim]less text, no speed test[/]",
    "was demo --json > demo.json",
)
SCORES = ("was", "teal")
# The level of what is shown at one only.
LEVEL = 0.5
PROMPT = "It was a cold evening, and the old man"


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does.

    Attributes:
        calibration: windows of the calibration text, each of 512 tokens.
        recalibration: how many of them `recalibrate` reads, twice for each schedule.
        stride: every how many-th window of the test text is scored.
        limit: at most so many of them.
        levels: model sparsities.
        blocks: blocks of the speed test's model; 0 leaves the test out.
        speed_levels: sparsities of the speed test.
        int8_levels: of the speed test with weights of int8.
    """

    calibration: int
    recalibration: int
    stride: int
    limit: int
    levels: tuple[float, ...]
    blocks: int
    speed_levels: tuple[float, ...] = (0.5, 0.75)
    int8_levels: tuple[float, ...] = (0.0, 0.5)


FULL = Size(calibration=32, recalibration=16, stride=2, limit=56, levels=(0.25, 0.4, 0.5, 0.6, 0.75), blocks=2)
FAST = Size(calibration=8, recalibration=4, stride=14, limit=8, levels=(0.25, 0.5, 0.75), blocks=0)


def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Less text, and no speed test.")] = False,
    json: options.Json = False,
) -> None:
    """Calibrate, compare, quantise, generate and time: everything at once, without a network.

    Quality is shown on the language model inside was-fx (5.8 M parameters), speed on a stack of random weights with
    the shapes of Llama-3.2-1B.
    """
    size = FAST if fast else FULL
    console = stdout()
    if not json:
        screens.opening(console)
    rows = timed(size) if size.blocks else {}
    if rows and not json:
        screens.speed(console, rows, size.blocks)
    loaded = load_model(options.EMBEDDED, device="cpu")
    calibration, schedules = calibrated(loaded, size)
    quality = measured(loaded, schedules, size)
    if not json:
        screens.quality(console, quality, SCORES)
    better = improved(loaded, calibration, quality["was", LEVEL], size)
    if not json:
        screens.better(console, quality["dense", 0.0], better, LEVEL)
    texts = samples(loaded, schedules["was"][LEVEL])
    if not json:
        screens.samples(console, PROMPT, texts)
    if json:
        print_json(_as_json(quality, better, texts, rows))
        return
    screens.closing(console)


def calibrated(loaded: Loaded, size: Size) -> "tuple[Calibration, dict[str, dict[float, Schedule]]]":
    """The calibration with the WAS score and Fisher weights; and uniform schedules by score and level, with thresholds
    from the model as it runs sparsely."""
    from was_fx import embedded

    ids = embedded.tokens("calibration", 512, size.calibration)
    found: dict[str, dict[float, Schedule]] = {}
    calibrations: dict[str, Calibration] = {}
    for name in SCORES:
        with progress(f"Calibrating with the {name.upper()} score") as advance:
            calibration = calibrations[name] = was_fx.calibrate(
                loaded.model,
                ids,
                score=was_fx.Score.named(name),
                text="embedded:calibration",
                fisher=name == "was",
                batch_size=4,
                progress=advance,
            )
        found[name] = {}
        for level in size.levels:
            schedule = was_fx.uniform(calibration, level)
            with progress(f"Recalibrating it at {100 * level:.0f} %") as advance:
                found[name][level] = was_fx.recalibrate(
                    loaded.model, schedule, ids[: size.recalibration], batch_size=4, progress=advance
                )
    return calibrations["was"], found


def improved(
    loaded: Loaded, calibration: "Calibration", uniform: "Evaluation", size: Size
) -> "dict[str, tuple[Evaluation, int]]":
    """The recipe `fisher`, weights of int8, and both: each with the bytes of weights that a dense token reads."""
    from was_fx import embedded
    from was_fx.modules.linears import weight_bytes_per_token

    ids = embedded.tokens("calibration", 512, size.recalibration)
    test = embedded.tokens("test", 512)[:: size.stride][: size.limit]
    schedule = was_fx.fisher(calibration, LEVEL)
    found = {"uniform": (uniform, weight_bytes_per_token(loaded.model))}
    int8 = copy.deepcopy(loaded.model)
    with progress("Quantising to int8"):
        was_fx.quantize(int8, "int8")
    for name, model in (("fisher", loaded.model), ("int8", int8), ("int8, fisher", int8)):
        if "fisher" in name:
            with progress(f"Recalibrating {name}") as advance:
                fitted = was_fx.recalibrate(model, schedule, ids, batch_size=4, progress=advance)
            was_fx.sparsify(model, fitted)
        with progress(f"Scoring the test text, {name}") as advance:
            found[name] = (
                was_fx.evaluate(model, test, batch_size=4, progress=advance),
                weight_bytes_per_token(model),
            )
    was_fx.densify(loaded.model)
    return found


def measured(
    loaded: Loaded, schedules: "dict[str, dict[float, Schedule]]", size: Size
) -> "dict[tuple[str, float], Evaluation]":
    """Evaluations on the test text by (score, level); the dense one is ("dense", 0.0)."""
    from was_fx import embedded

    ids = embedded.tokens("test", 512)[:: size.stride][: size.limit]
    found: dict[tuple[str, float], Evaluation] = {}
    with progress("Scoring the test text, dense") as advance:
        found["dense", 0.0] = was_fx.evaluate(loaded.model, ids, batch_size=4, progress=advance)
    for level in size.levels:
        for name in SCORES:
            was_fx.sparsify(loaded.model, schedules[name][level])
            with progress(f"Scoring the test text, {name.upper()} at {100 * level:.0f} %") as advance:
                found[name, level] = was_fx.evaluate(loaded.model, ids, batch_size=4, progress=advance)
    was_fx.densify(loaded.model)
    return found


def samples(loaded: Loaded, schedule: "Schedule") -> dict[str, str]:
    """The same prompt continued by the dense model and by the sparse one, with the same random numbers."""
    texts = {}
    with progress("Writing with the dense model"):
        texts["dense"] = continuation(loaded, PROMPT, max_new_tokens=60, seed=1, temperature=0.6)["text"]
    was_fx.sparsify(loaded.model, schedule)
    with progress("Writing with the sparse model"):
        texts["sparse"] = continuation(loaded, PROMPT, max_new_tokens=60, seed=1, temperature=0.6)["text"]
    was_fx.densify(loaded.model)
    return texts


def timed(size: Size) -> "dict[str, SpeedRow]":
    """Decode speed of a few blocks with the shapes of Llama-3.2-1B, random weights of bf16 and of int8 and a small
    vocabulary; the first row is the dense one."""
    from transformers import LlamaConfig

    from was_fx.measure.speed import decode_speed, random_model

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=size.blocks,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    model = random_model(config)
    found: dict[str, SpeedRow] = {}
    how: dict[str, Any] = {"tokens": 17, "repetitions": 3, "lowering": "eager"}
    with progress("Timing dense and sparse in turn") as advance:
        dense, *rows = decode_speed(model, size.speed_levels, progress=advance, **how)
    found["dense"] = dense
    found |= {f"{100 * row.target:.0f} %": row for row in rows}
    with progress("Timing it with weights of int8") as advance:
        _, *rows = decode_speed(model, size.int8_levels, weights="int8", progress=advance, **how)
    found |= {f"int8, {100 * row.target:.0f} %" if row.target else "int8": row for row in rows}
    return found


def _as_json(
    quality: "dict[tuple[str, float], Evaluation]",
    better: "dict[str, tuple[Evaluation, int]]",
    texts: dict[str, str],
    rows: "dict[str, SpeedRow]",
) -> dict[str, Any]:
    evaluations = [
        {"score": score, "target": level, "perplexity": result.perplexity, **asdict(result)}
        for (score, level), result in quality.items()
    ]
    improvements = [
        {"what": what, "perplexity": result.perplexity, "bytes": size * (1 - result.bytes_saved), **asdict(result)}
        for what, (result, size) in better.items()
    ]
    return {
        "quality": evaluations,
        "better": improvements,
        "samples": {"prompt": PROMPT, **texts},
        "speed": [{"what": what, **asdict(row)} for what, row in rows.items()],
    }

"""`was report`: how much sparsity a model stands and what it gains, as a page to share."""

import functools
import hashlib
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.compare_inputs import read_trials
from was_fx.cli.input.eval_results import read_eval
from was_fx.cli.input.files import check_output, load_calibration, load_schedule, short_name
from was_fx.cli.input.models import DTYPE_NAMES, Loaded, load_model, lowering_name, torch_device
from was_fx.cli.input.prompts import beginnings, continuation, prompt_tokens
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.input.weights import parse_formats
from was_fx.cli.render.console import note, print_json, progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from was_fx import Schedule
    from was_fx.choosing.choices import Choice, Subject
    from was_fx.choosing.decision import Decision

EXAMPLES = options.examples(
    "was report embedded --schedule s25.was.safetensors --schedule s50.was.safetensors",
    "was report embedded --schedule s50.was.safetensors --weights int8 --no-speed  [dim]formats side by side[/]",
    "was report ./llama --schedule s50.was.safetensors --text test.txt --weights int8 --weights int4",
    "was report ./llama --schedule s.was.safetensors --text test.txt --eval eval.json --history search.jsonl "
    "--calibration calibration.safetensors  [dim]every section[/]",
)
OUT = Path("report.html")


def report(
    model: options.Model,
    schedule: Annotated[
        list[Path],
        typer.Option(
            "--schedule",
            "-s",
            metavar="FILE",
            help="A file, or a name of `was published list`; may be given several times.",
        ),
    ],
    text: options.Text = None,
    weights: options.Formats = None,
    within: Annotated[
        float,
        typer.Option(
            parser=options.parse_share,
            metavar="SHARE",
            help="How much higher perplexity may be than dense in the choice that is named.",
        ),
    ] = "5%",  # type: ignore[assignment]  # parsed
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the scores in it, with the schedules' thresholds.")
    ] = None,
    eval_results: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="What `was eval --json` printed; may be given several times."),
    ] = None,
    history: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The trials of a search (JSON lines); may be given several times."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What to continue side by side. By default three beginnings from the text."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that continue a prompt.")] = 48,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time decoding on this machine.")] = True,
    repetitions: Annotated[int, typer.Option(min=1, metavar="N", help="How often each is timed.")] = 5,
    prefill: options.PrefillOption = options.Prefill.sparse,
    length: options.Length = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Score at most so many windows.")] = None,
    batch_size: options.BatchSize = 4,
    lowering: options.LoweringOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = OUT,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure a model dense, with schedules and in formats of weights, and write a page that says which to take.

    The page is one HTML file that loads nothing. It has the choice that decodes fastest within a limit of perplexity,
    loss against bytes and speed, where each schedule is sparse, and the same prompts continued by each.

    Every measurement is kept in a file beside the page (report.jsonl) as soon as it is made: the same command goes on
    from there, and redraws the page in no time. Remove that file to measure anew.
    """
    decoding = lowering_name(lowering, device)
    formats = parse_formats(weights)
    check_output(out, force)
    source = read_text(text, model, "test")
    schedules = _by_name(schedule)
    scores = load_calibration(calibration) if calibration else None
    evaluations = [read_eval(path) for path in eval_results or []]
    searches = [read_trials(path) for path in history or []]

    from was_fx.choosing.choices import Method, measure_choices
    from was_fx.choosing.decision import decide
    from was_fx.choosing.results_log import ResultsLog
    from was_fx.cli.page.page import Report, render
    from was_fx.cli.page.words import headline
    from was_fx.measure.machine import environment
    from was_fx.schedules.files.atomic import write_atomically

    prompts = prompt or beginnings(source.content)
    machine = environment(str(torch_device(device)))
    setting = {
        **_identity(model),
        **machine,
        "dtype": dtype.value,
        "text": hashlib.sha256(source.content.encode()).hexdigest(),
        "length": length,
        "limit": limit,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
    }
    method = Method(prefill.value, batch_size, speed, repetitions, decoding, allow_other_model)
    log = ResultsLog(out.with_suffix(".jsonl"))

    @functools.cache
    def loaded() -> "tuple[Loaded, Tensor]":
        found = load_model(model, dtype, device)
        for each in prompts:
            prompt_tokens(found, each, max_new_tokens)  # says what is wrong before anything is measured
        return found, windows(found, source, length=length, limit=limit)

    what = {**setting, "measured": "model"}
    facts = log.get(what) or log.add(what, _facts(*loaded()))
    try:
        choices = measure_choices(
            lambda: _subject(*loaded(), prompts, max_new_tokens),
            schedules,
            {facts["format"]: None, **formats},
            method=method,
            log=log,
            setting=setting,
            watch=progress,
        )
    except KeyboardInterrupt:
        note(f"Measured results are kept in {out.with_suffix('.jsonl')}; the same command goes on from there.")
        raise
    decision = decide(choices, within)
    scored = f"{facts['windows'] * facts['length']:,} tokens in windows of {facts['length']}"
    page = Report(
        model=model,
        text=source.name,
        setting=f"Measured on {source.name}, {scored}, prefill {prefill.value}; {machine['device']}.",
        choices=choices,
        decision=decision,
        schedules=schedules,
        prompts=prompts,
        calibration=scores,
        evaluations=evaluations,
        searches=searches,
        environment=_environment(machine),
        command=shlex.join(["was", *sys.argv[1:]]),
    )
    write_atomically(out, render(page))
    if json:
        print_json(_as_json(out, headline(decision), choices, decision))
        return
    say(headline(decision), style="bold")
    say(f"Wrote {out}")


def _by_name(given: "list[Path]") -> "dict[str, Schedule]":
    """Schedules by the shortest names that tell them apart: of their files, or else their paths.

    Raises:
        typer.BadParameter: one is given twice.
        ValueError, OSError: one can't be read.
    """
    if len(set(given)) < len(given):
        twice = next(each for each in given if given.count(each) > 1)
        raise typer.BadParameter(f"{twice} is given twice", param_hint="'--schedule'")
    short = [short_name(each) for each in given]
    names = short if len(set(short)) == len(short) else [str(each) for each in given]
    return {name: load_schedule(each) for name, each in zip(names, given, strict=True)}


def _identity(model: str) -> dict[str, Any]:
    """What tells a model from others of its name: of a folder, its files' sizes and times."""
    folder = Path(model)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {"model": model, "files": [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in files]}


def _facts(loaded: Loaded, ids: "Tensor") -> dict[str, Any]:
    """What can only be told of a model once it is loaded."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return {"format": loaded.weights or DTYPE_NAMES.get(dtype, dtype), "windows": len(ids), "length": ids.shape[1]}


def _subject(loaded: Loaded, ids: "Tensor", prompts: list[str], max_new_tokens: int) -> "Subject":
    from was_fx.choosing.choices import Subject

    def write(model: Any) -> list[str]:
        now = Loaded(loaded.name, model, loaded.tokenizer)
        return [continuation(now, prompt, max_new_tokens=max_new_tokens)["text"] for prompt in prompts]

    return Subject(loaded.model, ids, write)


def _environment(machine: dict[str, Any]) -> dict[str, str]:
    names = {"device": "processor or GPU", "threads": "CPU threads", "was_fx": "was-fx"}
    found = {names.get(key, key): str(value) for key, value in machine.items()}
    return {**found, "Python": platform.python_version(), "system": platform.platform()}


def _as_json(out: Path, headline: str, choices: "list[Choice]", decision: "Decision") -> dict[str, Any]:
    def row(choice: "Choice") -> dict[str, Any]:
        return {**asdict(choice), "ratio": choice.ratio}

    return {
        "out": str(out),
        "headline": headline,
        "within": decision.within,
        "fits": decision.fits,
        "choice": decision.choice and row(decision.choice),
        "choices": [row(each) for each in choices],
    }

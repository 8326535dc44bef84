"""`was inspect`: what is in a schedule or a calibration."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.compare_inputs import read_results
from was_fx.cli.input.files import check_output, load_any
from was_fx.cli.input.models import load_skeleton
from was_fx.cli.render.console import note, print_json, stdout
from was_fx.cli.render.contents import (
    calibration_json,
    predictions,
    schedule_json,
    show_calibration,
    show_schedule,
)
from was_fx.cli.render.export import ENDINGS, export_schedule

if TYPE_CHECKING:
    from was_fx import Schedule

EXAMPLES = options.examples(
    "was inspect schedule.was.safetensors",
    "was inspect was-llama-2-7b-60 --gpu h200  [dim]a published one, by name[/]",
    "was inspect schedule.was.safetensors --model ./llama --ppl ppl.json  [dim]with the head, and as measured[/]",
    "was inspect schedule.was.safetensors --export schedule.csv  [dim]or .json, .md[/]",
    "was inspect calibration.safetensors --json",
)


def inspect_file(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A schedule, a name of `was published list`, or a calibration."),
    ],
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="A schedule's thresholds τ, in score units, instead of sparsities.")
    ] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Predict a decode step on this GPU, such as h200. By default on all known."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Its model, of which the configuration is read: counts what is not scheduled."
        ),
    ] = None,
    ppl: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What `was ppl --json` printed for it: what it realises, and perplexity."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it too: a file that ends in .csv, .json or .md.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Show what is in a schedule or a calibration.

    Of a schedule the sparsity of each Linear, where the budget goes, what it saves, what a decode step is predicted to
    take, what to look at twice, and where it comes from; of a calibration the thresholds τ that drop 25, 50, 75 and
    90 % of the inputs.
    """
    from was_fx import Schedule

    gpus = _gpus(gpu)
    if export is not None:
        if export.suffix.lower() not in ENDINGS:
            raise typer.BadParameter(f"{export} must end in {', '.join(ENDINGS)}", param_hint="'--export'")
        check_output(export, force, "--export")
    results = read_results(ppl or [])
    found = load_any(file)
    if not isinstance(found, Schedule):
        _only_for_schedules({"--gpu": gpu, "--model": model, "--ppl": ppl, "--export": export}, file)
        if json:
            print_json(calibration_json(str(file), found))
        else:
            show_calibration(stdout(), file.name, found)
        return
    measured = None if results is None else results.of(str(file), found)
    rest = None if model is None else _rest(model, found)
    predicted, unpredicted = predictions(found, rest, gpus)
    content = {
        **schedule_json(str(file), found),
        "other_weights": rest,
        "measured": measured and asdict(measured),
        "predicted": [asdict(each) for each in predicted],
        "not_predicted": unpredicted,
    }
    if export is not None:
        export_schedule(export, file.name, found, content)
    if json:
        print_json(content)
    else:
        show_schedule(stdout(), file.name, found, thresholds=thresholds, measured=measured, rest=rest, gpus=gpus)
    if export is not None:
        note(f"Wrote {export}")


def _gpus(names: list[str] | None) -> list[str] | None:
    from was_fx.schedules.decode_time import find_gpu

    try:
        return [find_gpu(name) for name in names] if names else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--gpu'") from None


def _only_for_schedules(given: dict[str, Any], file: Path) -> None:
    wrong = [option for option, value in given.items() if value]
    if wrong:
        raise ValueError(f"{file} is a calibration; {', '.join(wrong)} can be given for a schedule only")


def _rest(name: str, schedule: "Schedule") -> float:
    """Weights of the Linears of a model that a schedule leaves dense.

    Raises:
        ValueError: there is no such model, or the schedule is for another.
    """
    from was_fx.modules.linears import find_linears

    linears = find_linears(load_skeleton(name))
    missing = [each for each in schedule.linears if each not in linears]
    if missing:
        raise ValueError(f"{name} has no Linear {missing[0]}; give the model that the schedule was made for")
    return float(sum(each.matrix.numel() for key, each in linears.items() if key not in schedule.linears))

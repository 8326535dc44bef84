"""`was inspect`: what is in a schedule or a calibration."""

from pathlib import Path
from typing import Annotated

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_any
from was_fx.cli.render.console import print_json, stdout
from was_fx.cli.render.contents import calibration_json, schedule_json, show_calibration, show_schedule

EXAMPLES = options.examples(
    "was inspect schedule.was.safetensors",
    "was inspect schedule.was.safetensors --thresholds",
    "was inspect calibration.safetensors --json",
)


def inspect_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule or a calibration (safetensors).")],
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="A schedule's thresholds τ, in score units, instead of sparsities.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what is in a schedule or a calibration.

    Of a schedule the sparsity of each Linear, what it saves and where it comes from; of a calibration the thresholds
    τ that drop 25, 50, 75 and 90 % of the inputs.
    """
    from was_fx import Schedule

    found = load_any(file)
    if isinstance(found, Schedule):
        if json:
            print_json(schedule_json(str(file), found))
        else:
            show_schedule(stdout(), file.name, found, thresholds=thresholds)
    elif json:
        print_json(calibration_json(str(file), found))
    else:
        show_calibration(stdout(), file.name, found)

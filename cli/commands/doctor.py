"""`was doctor`: does was-fx work here, and what would a model run by?"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import load_skeleton, torch_device, torch_dtype
from was_fx.cli.input.weights import parse_weights
from was_fx.cli.render import doctor_screens as screens
from was_fx.cli.render.console import print_json, progress, stdout

if TYPE_CHECKING:
    from was_fx.doctor.kernel_plan import KernelUse

EXAMPLES = options.examples(
    "was doctor  [dim]versions, processor, GPUs, caches, a test of the kernels[/]",
    "was doctor ./llama --weights int8  [dim]and which kernel each Linear would use[/]",
    "was doctor embedded --schedule s.was.safetensors --json",
)


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Directory or Hub name of a causal LM, or [bold]embedded[/]: say what its Linears would run by. Only "
            "its configuration is read.",
        ),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option(
            "--schedule", "-s", metavar="FILE", help="Of the model; without one, all Linears but the head are sparse."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar=options.WEIGHTS_METAVAR, help=f"As if the model was quantised so. {options.WEIGHT_FORMATS}"
        ),
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    json: options.Json = False,
) -> None:
    """Look at everything that was-fx needs, and test its kernels against plain PyTorch on this machine.

    The exit code is 1 if something is broken; a sentence for each problem says what to do.
    """
    for given, option in ((schedule, "--schedule"), (weights, "--weights")):
        if given and model is None:
            raise typer.BadParameter("give the model too: was doctor MODEL …", param_hint=f"'{option}'")
    where = torch_device(device)
    plan = None if model is None else _plan(model, schedule, weights, dtype, where, allow_other_model)
    from was_fx.doctor.diagnosis import diagnose, problems

    with progress("Testing the kernels") as advance:
        found = diagnose(where, advance)
    wrong = problems(found, plan or [])
    if json:
        rows = [asdict(row) | {"passed": row.passed} for row in found.self_test]
        uses = None if plan is None else [asdict(use) for use in plan]
        print_json({"ok": not wrong, "problems": wrong, **asdict(found), "self_test": rows, "kernels": uses})
    else:
        screens.show(stdout(), found)
        if plan is not None and model is not None:
            screens.show_plan(stdout(), model, plan)
        screens.verdict(stdout(), wrong)
    if wrong:
        raise typer.Exit(1)


def _plan(
    name: str,
    schedule: Path | None,
    weights: list[str] | None,
    dtype: options.Dtype,
    device: Any,
    allow_other_model: bool,
) -> "list[KernelUse]":
    import torch

    from was_fx.doctor.kernel_plan import kernel_plan

    found = load_schedule(schedule) if schedule else None
    plan = parse_weights(weights)
    with progress(f"Reading the configuration of {name}"):
        skeleton = load_skeleton(name)
    number = torch_dtype(options.Dtype.fp32 if name == options.EMBEDDED and dtype is options.Dtype.auto else dtype)
    if number == "auto":
        number = skeleton.config.dtype or torch.float32
    saved = getattr(skeleton.config, "quantization_config", None) or {}
    if plan is None and saved.get("quant_method") == "was":  # a checkpoint that was-fx saved
        plan = {linear: format for linear, format in saved.get("weights", {}).items() if format != "tied"} or None
    return kernel_plan(skeleton, device, number, schedule=found, weights=plan, allow_other_model=allow_other_model)

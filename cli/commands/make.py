"""`was make`: a schedule from a calibration."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output, load_calibration
from was_fx.cli.render.console import print_json, say

EXAMPLES = options.examples(
    "was make calibration.safetensors --target 0.5",
    "was make calibration.safetensors --target 0.5 --exclude '*.v_proj' --exclude 're:.*layers[.][01][.].*'",
    "was make calibration.safetensors --target 0.5 --fisher  [dim]of was calibrate --fisher[/]",
    "was make calibration.safetensors --target 60% --out llama-60.was.safetensors",
)


def make(
    calibration: Annotated[Path, typer.Argument(metavar="CALIBRATION", help="A file that `was calibrate` wrote.")],
    target: Annotated[
        float,
        typer.Option(
            parser=options.parse_share,
            metavar="SHARE",
            help="Share of the scheduled weights that a token shall not read, such as 0.5 or 50%.",
        ),
    ],
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher",
            help="Let each Linear be as sparse as the loss allows, by the Fisher weights of was calibrate --fisher, in "
            "place of the same sparsity for all.",
        ),
    ] = False,
    latency: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --fisher: save time by these measured curves in place of bytes, as much as the same sparsity "
            "for all would save; JSON lines as for was search --latency.",
        ),
    ] = None,
    out: options.ScheduleOut = options.SCHEDULE_OUT,
    include: options.Include = None,
    exclude: options.Exclude = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Make a schedule from a calibration: the same sparsity for every Linear, or by Fisher weights. Needs no model and
    takes no time."""
    if latency is not None and not fisher:
        raise typer.BadParameter("--latency is for --fisher", param_hint="'--latency'")
    check_output(out, force)
    found = load_calibration(calibration)

    chosen: dict[str, Any] = {"include": include or None, "exclude": exclude or ()}
    if latency is not None:
        from was_fx.schedules.search.latency import LatencyTable

        chosen["latency"] = LatencyTable.load(latency)
    schedule = (was_fx.fisher if fisher else was_fx.uniform)(found, target, **chosen)
    schedule.save(out)
    if json:
        print_json({"path": str(out), "target": target, "nominal": schedule.sparsity, "linears": len(schedule.linears)})
        return
    score = "|x|·Fisher" if fisher else found.score
    say(f"Wrote {out}: {len(schedule.linears)} Linears at {100 * schedule.sparsity:.4g} %, score {score}")
    say(f"Next: was inspect {shlex.quote(str(out))}")

"""`was import`: a schedule from what TEAL, WAS or WINA released."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output, read_levels
from was_fx.cli.input.models import load_skeleton
from was_fx.cli.render.console import print_json, progress, say

EXAMPLES = options.examples(
    "was import TEAL/models/Mistral-7B --model mistralai/Mistral-7B-v0.1 --level 50% --out mistral-50.was.safetensors",
    "was import WAS/models/Llama-2-7B --model ./llama-2-7b --blocks blocks.json --out llama-60.was.safetensors",
)


def import_artifacts(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A released folder: histograms/layer-*/{self_attn,mlp}/histograms.pt and lookup/layer-*/results.csv.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The model that the folder was made for: a directory or Hub name. Only its configuration is read.",
        ),
    ],
    out: options.ScheduleOut,
    level: Annotated[
        float | None,
        typer.Option(
            parser=options.parse_share,
            metavar="SHARE",
            help="The same level for every block, such as 0.5 or 50%, as TEAL and WINA have it.",
        ),
    ] = None,
    blocks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON list of levels, one for each block, as WAS has it.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Make a schedule of histograms and greedy tables that TEAL, WAS or WINA released, or that their code wrote.

    Which method it is shows in the files. Levels are by the release's own count of parameters; what they are by the
    true one is printed. Pickles are loaded without running code from them.
    """
    if (level is None) == (blocks is None):
        raise typer.BadParameter("give either --level or --blocks", param_hint="'--level'")
    check_output(out, force)
    levels = read_levels(blocks) if blocks is not None else level or 0.0

    from was_fx.modules.linears import body_linears, find_linears
    from was_fx.schedules.files.fingerprint import fingerprint_without_weights

    with progress(f"Reading the configuration of {model}"):
        skeleton = load_skeleton(model)
    shapes = {name: linear.shape for name, linear in find_linears(skeleton).items()}
    body = {name: shapes[name] for name in body_linears(skeleton)}
    fingerprint = fingerprint_without_weights(type(skeleton).__name__, shapes)
    with progress(f"Reading {folder}"):
        schedule = was_fx.import_release(folder, levels, body, fingerprint=fingerprint)
    schedule.save(out)
    target = schedule.metadata.target or 0.0
    if json:
        result = {"path": str(out), "method": schedule.metadata.recipe, "level": target, "nominal": schedule.sparsity}
        print_json({**result, "linears": len(schedule.linears)})
        return
    summary = f"{schedule.metadata.recipe.upper()}, {len(schedule.linears)} Linears at {100 * target:.2f} %"
    counted = f"{100 * schedule.sparsity:.2f} % by true counts"
    say(f"Wrote {out}: {summary}, {counted}")
    say(f"Next: was inspect {shlex.quote(str(out))}")

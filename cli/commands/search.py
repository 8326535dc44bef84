"""`was search`: a schedule by a published recipe or by ours."""

import shlex
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.input import options
from was_fx.cli.input.files import check_output, load_schedule
from was_fx.cli.input.models import load_model
from was_fx.cli.input.texts import read_text, windows
from was_fx.cli.render.console import print_json, progress, say
from was_fx.cli.render.search_progress import SearchDisplay

if TYPE_CHECKING:
    from was_fx import Schedule

EXAMPLES = options.examples(
    "was search embedded --target 60%  [dim]our own recipe, on the model inside was-fx[/]",
    "was search ./llama --target 50% --recipe fisher --text valid.txt --calibration-text train.txt",
    "was search ./llama --target 50% --recipe was --text valid.txt --calibration-text train.txt",
    "was search ./llama --target 50% --recipe was --text valid.txt --log was50.jsonl --resume  [dim]after a kill[/]",
    "was search ./llama --target 50% --text valid.txt --cost latency --latency kernels.jsonl",
)


# What a schedule is searched by, and what it is to save.
RecipeName = StrEnum("RecipeName", ["exact", "fisher", "was", "teal", "wina", "wisparse", "uniform"])
Cost = StrEnum("Cost", ["bytes", "latency"])


def search(
    model: options.Model,
    target: Annotated[
        float,
        typer.Option(
            parser=options.parse_share,
            metavar="SHARE",
            help="Share of the scheduled weights that a token shall not read, such as 0.5 or 50%. It is met exactly.",
        ),
    ],
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="exact (ours): all Linears at once, by measured sensitivities. fisher (ours): all Linears at once, by "
            "one backward pass. was: greedy inside blocks, Bayesian search over them. teal, wina: greedy inside "
            "blocks. wisparse: greedy and evolutionary, with an exponent per Linear. uniform: the same for all."
        ),
    ] = RecipeName.exact,
    text: options.Text = None,
    calibration_text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text for thresholds and for errors of blocks; by default as --text, for the embedded model its "
            "calibration text.",
        ),
    ] = None,
    out: options.ScheduleOut = options.SCHEDULE_OUT,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="How many trials over blocks; by default the recipe's. For exact: trials that refine its answer, by "
            "default none.",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Validation tokens of a trial (whole windows), at most about so many."),
    ] = 8192,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same schedule.")] = 0,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each trial as a JSON line here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search whose --log this is.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run so many trials at once, each in a process of its own.")
    ] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Run trials on a Dask cluster, tcp://host:8786; --workers says how many at once."
        ),
    ] = None,
    cost: Annotated[
        Cost,
        typer.Option(
            help="What exact and fisher save for the least loss: bytes read, or time by --latency: as much of it as "
            "the same sparsity everywhere would save."
        ),
    ] = Cost.bytes,
    latency: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured curves: JSON lines with n, k, sparsity and us for each shape of the model, as "
            "benchmarks/gpu_kernels.py prints them.",
        ),
    ] = None,
    corrections: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="For fisher: how often its weights are corrected by what channels cost where the model drops them, by "
            "default once. 0 takes half of the time or less, and adds 1.1 to 4 times as much loss.",
        ),
    ] = None,
    head: Annotated[
        bool, typer.Option("--head", help="Schedule the output head too (exact and uniform only).")
    ] = False,
    start: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A schedule whose block levels are tried first.")
    ] = None,
    paper_exact: Annotated[
        bool,
        typer.Option(
            "--paper-exact",
            help="teal, wina and was as their released code does it: thresholds by signed quantiles, the nearest row "
            "of the greedy table, and WAS's bounds and its count of k and v. The target is then met only nearly.",
        ),
    ] = False,
    length: options.Length = None,
    batch_size: options.BatchSize = 4,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Find how sparse each Linear should be, so that the model is as sparse as you ask and loses least.

    Candidates are judged by their loss on a validation text; give one that you will not report on. Thresholds are
    measured while the model runs sparsely, so it drops what the schedule says.
    """
    if (cost is Cost.latency) != (latency is not None):
        raise typer.BadParameter("--cost latency and --latency FILE go together", param_hint="'--cost'")
    if resume and log is None:
        raise typer.BadParameter("give the log to resume from with --log", param_hint="'--resume'")
    if weights and (workers > 1 or dask is not None):
        raise typer.BadParameter(
            "workers load the model from its checkpoint: write a quantised one first, with was quantize",
            param_hint="'--weights'",
        )
    check_output(out, force)

    from was_fx.schedules.search.latency import LatencyTable
    from was_fx.schedules.search.recipes import find_recipe

    chosen = find_recipe(recipe.value, paper_exact=paper_exact)
    if corrections is not None:
        if chosen.over != "fisher":
            raise typer.BadParameter(
                f"only the recipe fisher has corrections, not {recipe.value}", param_hint="'--corrections'"
            )
        chosen = replace(chosen, fisher=replace(chosen.fisher, corrections=corrections))
    validation = read_text(text, model, "validation")
    sample_text = read_text(calibration_text or text, model, "calibration")
    table = LatencyTable.load(latency) if latency else None
    first = load_schedule(start) if start else None
    executor = _workers(workers, dask)

    loaded = load_model(model, dtype, device, weights=weights)
    ids = windows(loaded, validation, length=length, tokens=tokens)
    samples = windows(loaded, sample_text, length=length, tokens=chosen.calibration_tokens)
    with progress(f"Calibrating on {samples.numel():,} tokens") as advance:
        calibration = was_fx.calibrate(
            loaded.model,
            samples,
            score=chosen.score,
            text=sample_text.name,
            fisher=chosen.over == "fisher",
            seed=seed,
            batch_size=batch_size,
            progress=advance,
        )
    with SearchDisplay() as display:
        found = was_fx.search(
            loaded.model,
            calibration,
            tokens=ids,
            target=target,
            recipe=chosen,
            trials=trials,
            seed=seed,
            calibration_tokens=samples,
            include_head=head,
            latency=table,
            start=first,
            log=log,
            resume=resume,
            workers=executor,
            batch=workers,
            batch_size=batch_size,
            text=validation.name,
            progress=display.update,
        )
    found.save(out)
    _show(found, out, model, json, display.seconds)


def _workers(count: int, address: str | None) -> Any:
    if address is None and count == 1:
        return None
    from was_fx.searching.workers import dask_cluster, local_processes

    return local_processes(count) if address is None else dask_cluster(address)


def _show(schedule: "Schedule", out: Path, model: str, json: bool, seconds: tuple[float, float]) -> None:
    history = dict(schedule.metadata.history)
    losses = history.get("best", [])
    if json:
        found: dict[str, Any] = {
            "path": str(out),
            "recipe": schedule.metadata.recipe,
            "target": schedule.metadata.target,
        }
        found |= {"nominal": schedule.sparsity, "loss": losses[-1] if losses else None, "history": history}
        print_json({**found, "trial_seconds": round(seconds[0], 2), "optimizer_seconds": round(seconds[1], 2)})
        return
    summary = f"{len(schedule.linears)} Linears at {100 * schedule.sparsity:.2f} %, {schedule.metadata.recipe}"
    say(f"Wrote {out}: {summary}")
    if losses:
        say(f"Validation loss {losses[0]:.4f} in the first trial, {losses[-1]:.4f} in the best")
        say(f"Trials took {seconds[0]:.0f} s, the optimiser {seconds[1]:.0f} s")
    say(f"Forward-pass tokens spent: {sum(history['tokens'].values()):,}")
    say(f"Next: was ppl {shlex.quote(model)} --schedule {shlex.quote(str(out))}")

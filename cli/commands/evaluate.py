"""`was eval`: tasks of lm-eval, dense and with schedules."""

import hashlib
import json as json_module
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import load_model, lowering_name
from was_fx.cli.render.console import note, print_json, say, stderr, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx.plugins.lm_eval import WasLM

EXAMPLES = options.examples(
    "was eval embedded  [dim]the 200 sentence pairs that come with was-fx[/]",
    "was eval embedded --schedule s50.was.safetensors --schedule s75.was.safetensors --pairs blimp.jsonl",
    "was eval embedded --schedule s50.was.safetensors --log eval.jsonl  [dim]can be interrupted and continued[/]",
    "was eval ./llama --schedule s.was.safetensors --task hellaswag --task arc_easy --limit 200",
)


def evaluate(
    model: options.Model,
    schedule: options.Schedules = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of lm-eval by name; may be given several times.")
    ] = None,
    pairs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A task from a file: JSON lines with sentence_good and sentence_bad, as BLiMP's. Without --task and "
            "--pairs, the pairs that come with was-fx.",
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with more tasks (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many documents per task.")] = None,
    prefill: options.PrefillOption = options.Prefill.sparse,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts per forward pass.")] = 16,
    lowering: options.LoweringOption = None,
    weights: options.Weights = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep each schedule's result as a line of JSON, and take from there what has been measured before.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare a model, dense and with schedules, on tasks of EleutherAI's lm-eval.

    Needs lm-eval: [bold]pip install "was-fx[eval]"[/]. Realised sparsity is measured on the tasks' own texts.
    """
    decoding = lowering_name(lowering, device, counted=True)
    schedules = {path: load_schedule(path) for path in schedule or []}
    every: list[Path | None] = [None, *schedules]  # the dense model first
    _quiet()
    try:
        from was_fx.plugins import lm_eval
    except ImportError as error:
        raise ValueError(str(error)) from error
    files = [lm_eval.minimal_pairs(path) for path in pairs or []]
    tasks: list[Any] = [*(task or []), *files] or [lm_eval.minimal_pairs()]
    settings: dict[str, Any] = {
        "model": model,
        "prefill": prefill.value,
        "limit": limit,
        "dtype": dtype.value,
        "tasks": tasks,
    }
    if weights:
        settings["weights"] = weights
    known = _read_log(log, settings) if log else {}
    missing = [path for path in every if _key(path) not in known]
    lm: Any = None
    if missing:
        loaded = load_model(model, dtype, device, weights=weights)
        lm = lm_eval.WasLM(
            loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            prefill=prefill.value,
            lowering=decoding,
            allow_other_model=allow_other_model,
        )
    for path in missing:
        note(f"Evaluating {path or 'dense'} …", style="")
        lm.use(schedules[path] if path else None)
        results = lm_eval.run_tasks(lm, tasks, limit=limit, include_path=include_path)
        known[_key(path)] = {**_sparsity(lm), "tasks": results}
        if log:
            _append(log, {"settings": settings, "key": _key(path), **known[_key(path)]})
    rows = [{"schedule": str(path) if path else None, **known[_key(path)]} for path in every]
    if json:
        found = {"model": model, "weights": weights, "prefill": prefill.value, "limit": limit, "results": rows}
        print_json(found)
        return
    named = model if not weights else f"{model}, weights {' '.join(weights)}"
    _show(rows, f"{named}, prefill {prefill.value}" + (f", first {limit} documents" if limit else ""))


def _key(path: Path | None) -> str:
    """What a schedule file holds, whatever it is called."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else "dense"


def _read_log(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of a log that were measured with these settings, by key.

    Raises:
        ValueError: the file is no such log.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json_module.loads(line)
            row_settings, key = row.pop("settings"), row.pop("key")
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{path}, line {number}, is no result of `was eval`; give another --log") from None
        if row_settings == settings:
            found[key] = row
    return found


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, so that the file never holds a part of one."""
    from was_fx.schedules.files.atomic import write_atomically

    before = path.read_bytes() if path.exists() else b""
    write_atomically(path, before + json_module.dumps(row).encode() + b"\n")


def _quiet() -> None:
    """Keep the notes and, without a terminal, the bars of lm-eval and its libraries away from ours."""
    if not stderr().is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _sparsity(harness: "WasLM") -> dict[str, float]:
    from was_fx.sparse.state import sparse_state

    state = sparse_state(harness.model)
    if state is None:
        return {"nominal": 0.0, "realised": 0.0, "bytes_saved": 0.0}
    found = harness.realised
    return {"nominal": state.schedule.sparsity, "realised": found.sparsity, "bytes_saved": found.bytes_saved}


def _show(rows: list[dict[str, Any]], title: str) -> None:
    columns = [
        (task, metric)
        for task, found in rows[0]["tasks"].items()
        for metric, value in found.items()
        if isinstance(value, float) and "_stderr," not in metric
    ]
    headings = [f"{task} {metric.removesuffix(',none')}" for task, metric in columns]
    table = new_table("schedule", *headings, "nominal", "realised", "bytes saved")
    for row in rows:
        scores = [_score(row["tasks"][task], metric) for task, metric in columns]
        shares = [percent(row[key]) if row["schedule"] else "–" for key in ("nominal", "realised", "bytes_saved")]
        table.add_row(row["schedule"] or "dense", *scores, *shares)
    say(title, style="bold")
    stdout().print(table)


def _score(found: dict[str, Any], metric: str) -> str:
    """A metric with its standard error, if lm-eval gives one: `0.812 ± 0.004`."""
    name, comma, rest = metric.partition(",")
    error = found.get(f"{name}_stderr{comma}{rest}")
    return f"{found[metric]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")

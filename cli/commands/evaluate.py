"""`was eval`: tasks of lm-eval, dense and with schedules, in formats of weights."""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule, short_name
from was_fx.cli.input.models import load_model, lowering_name
from was_fx.cli.input.weights import parse_formats
from was_fx.cli.render.console import note, print_json, say, stderr, stdout
from was_fx.cli.render.tables import new_table, percent

if TYPE_CHECKING:
    from was_fx.plugins.lm_eval import WasLM

EXAMPLES = options.examples(
    "was eval embedded  [dim]the 200 sentence pairs that come with was-fx[/]",
    "was eval embedded --schedule s50.was.safetensors --schedule s75.was.safetensors --pairs blimp.jsonl",
    "was eval embedded --schedule s50.was.safetensors --weights int8 --log eval.jsonl  "
    "[dim]each format dense and sparse; can be interrupted and continued[/]",
    "was eval ./llama --schedule s.was.safetensors --task piqa,arc_easy,arc_challenge,hellaswag,winogrande",
    "was eval ./llama --schedule s.was.safetensors --task gsm8k,mmlu --fewshot 5 --limit 200",
)

ROOMY = 76  # columns of a terminal from which on tables have all of theirs


def evaluate(
    model: options.Model,
    schedule: options.Schedules = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "--tasks",
            metavar="NAME[,NAME]…",
            help="Tasks of lm-eval by name; may be given several times.",
        ),
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
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Examples in the prompt. By default what a task says, else none."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Write prompts as the tokenizer's chat template has them.")
    ] = False,
    prefill: options.PrefillOption = options.Prefill.sparse,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts per forward pass.")] = 16,
    lowering: options.LoweringOption = None,
    weights: options.Formats = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the result of each task of each variant as a line of JSON, and take from there what has been "
            "measured before.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare a model, dense and with schedules, on tasks of EleutherAI's lm-eval.

    Each format of weights is measured dense and with every schedule. What a task lost against the dense model of the
    checkpoint stands beside it, in points and in standard errors: of the differences document by document where
    lm-eval gives them. Needs lm-eval: [bold]pip install "was-fx\\[eval]"[/]. Realised sparsity is measured on the
    tasks' own texts.
    """
    quiet()
    formats: list[str | None] = [None, *parse_formats(weights)]
    decoding = lowering_name(lowering, device, counted=True)
    schedules = {path: load_schedule(path) for path in schedule or []}
    lm_eval = harness()
    from was_fx.choosing.results_log import ResultsLog

    names = options.parse_names(task)
    tasks: list[Any] = [*names, *(lm_eval.minimal_pairs(path) for path in pairs or [])] or [lm_eval.minimal_pairs()]
    manager = lm_eval.task_manager(tasks, include_path)
    known = ResultsLog(log) if log else None
    setting: dict[str, Any] = {
        "command": "was eval",
        "model": model,
        "prefill": prefill.value,
        "limit": limit,
        "fewshot": fewshot,
        "chat_template": chat_template,
        "dtype": dtype.value,
    }
    measured: dict[tuple[str | None, Path | None], dict[str, Any]] = {}
    for format in formats:
        lm: Any = None
        for path in (None, *schedules):
            found: dict[str, Any] = {}
            for each in tasks:
                what = {**setting, "weights": format, "schedule": schedule_key(path), "task": each}
                result = known.get(what) if known else None
                if result is None:
                    if lm is None:
                        loaded = load_model(model, dtype, device, weights=format.split(",") if format else None)
                        lm = lm_eval.WasLM(
                            loaded.model,
                            tokenizer=loaded.tokenizer,
                            batch_size=batch_size,
                            bars=stderr().is_terminal,
                            prefill=prefill.value,
                            lowering=decoding,
                            allow_other_model=allow_other_model,
                        )
                    title = each if isinstance(each, str) else each["task"]
                    note(f"Evaluating {_label(format, path)} on {title} …", style="")
                    with warnings.catch_warnings():
                        if format is not None:  # it is asked for, and said below the table
                            warnings.filterwarnings("ignore", message="the schedule was made with weights")
                        lm.use(schedules[path] if path else None)
                    scores = lm_eval.run_tasks(
                        lm,
                        [each],
                        limit=limit,
                        fewshot=fewshot,
                        chat_template=chat_template,
                        manager=manager,
                        documents=True,
                    )
                    result = plain({**_sparsity(lm), "tasks": scores})
                    result = known.add(what, result) if known else result
                found.setdefault("parts", []).append(result)
            measured[format, path] = _joined(found["parts"])
    rows = [_row(format, path, found, measured[None, None]) for (format, path), found in measured.items()]
    if json:
        asked = {key: setting[key] for key in ("model", "prefill", "limit", "fewshot", "chat_template")}
        print_json({**asked, "weights": weights, "results": rows})
        return
    _show(rows, f"{model}, prefill {prefill.value}" + (f", first {limit} documents" if limit else ""))


def _label(format: str | None, path: Path | None) -> str:
    """What a variant is called."""
    parts = [format, "dense" if path is None else short_name(path)]
    return ", ".join(part for part in parts if part)


def schedule_key(path: Path | None) -> str:
    """What a schedule file holds, whatever it is called."""
    if path is None:
        return "dense"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def plain(found: Any) -> Any:
    """Results as JSON has them: of numbers that are none, None."""
    if isinstance(found, dict):
        return {key: plain(each) for key, each in found.items()}
    if isinstance(found, list):
        return [plain(each) for each in found]
    if isinstance(found, float) and found != found:
        return None
    return found if isinstance(found, (str, int, float, bool)) or found is None else str(found)


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One variant's results over its tasks; its sparsity is their mean."""
    shares = {key: sum(part[key] for part in parts) / len(parts) for key in ("nominal", "realised", "bytes_saved")}
    return {**shares, "tasks": {name: found for part in parts for name, found in part["tasks"].items()}}


def _row(format: str | None, path: Path | None, found: dict[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` prints of a variant."""
    from was_fx.choosing.score_changes import first_metric, metrics_of, score_change

    tasks = found["tasks"]
    changes = {
        task: {
            metric: {"change": each.change, "error": each.error, "errors": each.errors, "paired": each.paired}
            for metric in metrics_of(scores)
            for each in [score_change(scores, dense["tasks"][task], metric)]
        }
        for task, scores in tasks.items()
    }
    firsts = [scores[metric] for scores in tasks.values() if (metric := first_metric(scores))]
    return {
        "weights": format,
        "schedule": str(path) if path else None,
        **{key: found[key] for key in ("nominal", "realised", "bytes_saved")},
        "mean": sum(firsts) / len(firsts) if firsts else None,
        "tasks": {
            name: {key: each for key, each in scores.items() if key != "documents"} for name, scores in tasks.items()
        },
        "changes": changes,
    }


def quiet() -> None:
    """Keep the notes and, without a terminal, the bars of lm-eval and its libraries away from ours."""
    if not stderr().is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def harness() -> Any:
    """The plug-in for lm-eval.

    Raises:
        ValueError: lm-eval is missing; says how to install it.
    """
    try:
        from was_fx.plugins import lm_eval
    except ImportError as error:
        raise ValueError(str(error)) from error
    return lm_eval


def _sparsity(harness: "WasLM") -> dict[str, float]:
    from was_fx.sparse.state import sparse_state

    state = sparse_state(harness.model)
    if state is None:
        return {"nominal": 0.0, "realised": 0.0, "bytes_saved": 0.0}
    found = harness.realised
    return {"nominal": state.schedule.sparsity, "realised": found.sparsity, "bytes_saved": found.bytes_saved}


def _show(rows: list[dict[str, Any]], title: str) -> None:
    say(title, style="bold")
    labels = [_label(row["weights"], Path(row["schedule"]) if row["schedule"] else None) for row in rows]
    roomy = stdout().width >= ROOMY
    columns = ("task", "variant", "score", "change", "in errors")[: 5 if roomy else 4]
    table = new_table(*columns, texts=2)
    for task, metric in _columns(rows):
        for row, label in zip(rows, labels, strict=True):
            if metric not in row["tasks"].get(task, {}):
                continue
            name = f"{task} {metric.removesuffix(',none')}" if row is rows[0] else ""
            cells = (name, label, _score(row["tasks"][task], metric), *_change(row, task, metric))
            table.add_row(*cells[: len(columns)])
    stdout().print(table)
    if len(rows) == 1:
        return
    named = ("nominal", "realised", "bytes saved") if roomy else ("nominal", "realised")
    summary = new_table("variant", "mean score", "change", *named)
    for row, label in zip(rows, labels, strict=True):
        shares = [percent(row[key]) if row["schedule"] else "–" for key in ("nominal", "realised", "bytes_saved")]
        known = row["mean"] is not None and row is not rows[0]
        change = _points(row["mean"] - rows[0]["mean"]) if known else "–"
        mean = "–" if row["mean"] is None else f"{row['mean']:.3f}"
        summary.add_row(label, mean, change, *shares[: len(named)])
    stdout().print(summary)
    note(
        "Changes are against the first row, of accuracies in points, and in standard errors: more than 2 are hardly "
        "chance. The mean is over tasks; bytes saved are of all weights.",
        style="dim",
    )
    if any(row["weights"] and row["schedule"] for row in rows):
        note("A schedule's thresholds fit best on the format of weights that they were measured in.", style="dim")


def _columns(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    from was_fx.choosing.score_changes import metrics_of

    for task, scores in rows[0]["tasks"].items():
        for metric in metrics_of(scores):
            yield task, metric


def _change(row: dict[str, Any], task: str, metric: str) -> tuple[str, str]:
    """What was lost, with its error, and how many errors that is."""
    if row["schedule"] is None and row["weights"] is None:
        return "–", "–"
    found = row["changes"][task][metric]
    value, error = found["change"], found["error"]
    share = 0 <= row["tasks"][task][metric] <= 1
    change = _points(value) if share else f"{value:+.3f}"
    if error is None:
        return change, "–"
    spread = f"{100 * error:.1f}" if share else f"{error:.3f}"
    return f"{change} ± {spread}", "–" if found["errors"] is None else f"{found['errors']:+.1f}"


def _points(change: float) -> str:
    return f"{100 * change:+.1f}"


def _score(found: dict[str, Any], metric: str) -> str:
    """A metric with its standard error, if lm-eval gives one: `0.812 ± 0.004`."""
    from was_fx.choosing.score_changes import error_key

    error = found.get(error_key(metric))
    return f"{found[metric]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")

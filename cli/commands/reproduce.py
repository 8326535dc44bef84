"""`was reproduce`: a published table measured again, its numbers beside ours."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import was_fx
from was_fx.cli.commands.evaluate import ROOMY, harness, plain, quiet, schedule_key
from was_fx.cli.commands.ppl import fitted
from was_fx.cli.input import options
from was_fx.cli.input.datasets import read_dataset
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import Loaded, load_model, load_skeleton, lowering_name
from was_fx.cli.input.texts import sequences
from was_fx.cli.render.console import note, print_json, progress, say, stderr, stdout
from was_fx.cli.render.tables import new_table, percent
from was_fx.schedules.names import suggestion

if TYPE_CHECKING:
    from was_fx import Schedule
    from was_fx.schedules.released.tables import PublishedTable, PublishedValue

EXAMPLES = options.examples(
    "was reproduce --list",
    "was reproduce was-paper-llama-2-7b --model meta-llama/Llama-2-7b-hf",
    "was reproduce was-notebook-llama-2-7b --model ./llama --log table.jsonl  [dim]can be interrupted and continued[/]",
    "was reproduce was-notebook-mistral-7b --model ./mistral --only wikitext2,gsm8k --limit 50",
    "was reproduce was-notebook-llama-2-7b --model ./other --schedule s60.was.safetensors --only c4 "
    "--dataset c4=c4-validation.00000-of-00008.json.gz  [dim]another model, offline[/]",
)
DENSE = "dense"


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="TABLE", help="A name of --list.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Directory or Hub name of the model.",
            show_default="the table's own, from the Hub",
        ),
    ] = None,
    list_tables: Annotated[bool, typer.Option("--list", help="List the tables and what each needs.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME]…", help="Only these data sets and tasks of the table."),
    ] = None,
    schedule: Annotated[
        list[Path] | None,
        typer.Option(
            "--schedule",
            "-s",
            metavar="FILE",
            help="Take this in place of the published schedule, for another model; one for each level, in order.",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A local copy of wikitext2 or c4 in place of the Hub's, as for `was ppl`; may be given several times.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks (YAML), taken first.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="At most so many sequences of a data set and documents of a task."),
    ] = None,
    length: options.Length = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts per forward pass.")] = 4,
    lowering: options.LoweringOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    allow_other_model: options.OtherModel = False,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep each result as a line of JSON as soon as it is measured, and take from there what is known.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure a published table again: its schedules on its model, by its conventions, beside its numbers.

    Data sets and tasks come from the Hugging Face Hub, and need [bold]pip install "was-fx\\[eval]"[/]. With --limit,
    with a --length below the convention's own or with schedules of your own, numbers are not the table's.
    """
    from was_fx.schedules.released.tables import published_table

    if list_tables:
        _list(json)
        return
    if name is None:
        raise typer.BadParameter("give the name of a table, or --list", param_hint="'TABLE'")
    decoding = lowering_name(lowering, device, counted=True)
    quiet()
    table = published_table(name)
    measures = _chosen(table, only)
    copies = _copies(table, dataset)
    variants = _variants(table, schedule)
    model = model or table.model
    run = _Run(table, model, {"dtype": dtype, "device": device}, limit, length, batch_size, allow_other_model)
    tasks = [each for each in measures if each in table.tasks]
    if tasks:
        run.use_tasks(tasks, include_path, decoding)
    if log is not None:
        run.keep(log)
    _check_shapes(table, model, [each for each in variants if each], own=bool(schedule))

    rows: list[dict[str, Any]] = []
    for level, given in zip(table.levels, variants, strict=True):
        for measure in dict.fromkeys(value.measure for value in level.values):
            if measure not in measures:
                continue
            label = f"{measure}, {_level(level.level)}"
            result = run.measure(measure, given, label, copies.get(measure))
            values = [value for value in level.values if value.measure == measure]
            rows += [_row(level.level, given and given[0], value, result) for value in values]
    like = limit is None and not run.shorter and not schedule
    if json:
        print_json({"table": name, "model": model, "published_model": table.model, "source": table.source,
                    "convention": table.convention, "fewshot": table.fewshot, "limit": limit, "length": run.length,
                    "as_published": like, "rows": rows})  # fmt: skip
        return
    say(f"{name}: {model}, published in {table.source}", style="bold")
    _show(rows)
    if not like:
        why = [text for given, text in ((limit, "--limit"), (run.shorter, "shorter sequences"),
                                        (schedule, "schedules of your own")) if given]  # fmt: skip
        note(f"With {' and '.join(why)} these are not numbers of the table.")


class _Run:
    """Measures one (data set or task, variant) after the other; the model is loaded when the first needs it."""

    def __init__(
        self,
        table: "PublishedTable",
        model: str,
        loading: dict[str, Any],
        limit: int | None,
        length: int | None,
        batch_size: int,
        allow_other_model: bool,
    ) -> None:
        self.table, self.model, self.limit, self.length = table, model, limit, length
        self.shorter = False
        self._loading, self._batch_size, self._allow = loading, batch_size, allow_other_model
        self._loaded: Loaded | None = None
        self._log: Any = None
        self._lm: Any = None
        self._convention: Any = None
        self._tasks: dict[str, Any] = {}

    def use_tasks(self, tasks: Sequence[str], include_path: Path | None, lowering: str | None) -> None:
        """Find them, before anything is loaded.

        Raises:
            ValueError: lm-eval is missing, or doesn't know one.
        """
        lm_eval = harness()
        self._tasks = {"manager": lm_eval.task_manager(tasks, include_path), "lowering": lowering}

    def keep(self, log: Path) -> None:
        """Keep results in a file, and take from there what it has."""
        from was_fx.choosing.results_log import ResultsLog

        self._log = ResultsLog(log)

    def measure(
        self, measure: str, given: "tuple[Path, Schedule] | None", label: str, copy: str | None
    ) -> dict[str, Any]:
        """The result of one data set or task: metrics with their errors, and sparsity."""
        what = {
            "command": "was reproduce",
            "model": self.model,
            "measure": measure,
            "copy": copy,
            "schedule": schedule_key(given[0] if given else None),
            "convention": self.table.convention,
            "fewshot": self.table.fewshot if measure in self.table.tasks else None,
            "dtype": self._loading["dtype"].value,
            "limit": self.limit,
            "length": self.length,
        }
        known = self._log.get(what) if self._log else None
        if known is None:
            schedule = given[1] if given else None
            if measure in self.table.tasks:
                found = self._task(measure, schedule, label)
            else:
                found = self._perplexity(copy or measure, schedule, label)
            known = plain(found)
            known = self._log.add(what, known) if self._log else known
        self.shorter = self.shorter or bool(known.get("shorter"))
        return known

    def _model(self) -> Loaded:
        if self._loaded is None:
            self._loaded = load_model(self.model, **self._loading)
        return self._loaded

    def _perplexity(self, dataset: str, schedule: "Schedule | None", label: str) -> dict[str, Any]:
        from was_fx.measure.conventions import named

        source = read_dataset(dataset)
        loaded = self._model()
        if self._convention is None:
            self._convention = fitted(options.Convention(self.table.convention), loaded, self.length)
        ids = sequences(loaded, source, self._convention, limit=self.limit)
        if schedule is None:
            was_fx.densify(loaded.model)
        else:
            was_fx.sparsify(loaded.model, schedule, allow_other_model=self._allow)
        with progress(f"Scoring {label}") as advance:
            found = was_fx.evaluate(
                loaded.model, ids, progress=advance, batch_size=self._batch_size, **self._convention.arguments
            )
        was_fx.densify(loaded.model)
        return {
            "perplexity": found.perplexity,
            "nominal": found.nominal,
            "realised": found.realised,
            "shorter": self._convention != named(self.table.convention),
        }

    def _task(self, task: str, schedule: "Schedule | None", label: str) -> dict[str, Any]:
        from was_fx.measure.conventions import named
        from was_fx.plugins.lm_eval import WasLM, run_tasks

        if self._lm is None:
            loaded = self._model()
            self._lm = WasLM(
                loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=self._batch_size,
                bars=stderr().is_terminal,
                prefill=named(self.table.convention).prefill,
                lowering=self._tasks["lowering"],
                allow_other_model=self._allow,
            )
        note(f"Evaluating {label} …", style="")
        self._lm.use(schedule)
        scores = run_tasks(
            self._lm, [task], limit=self.limit, fewshot=self.table.fewshot, manager=self._tasks["manager"]
        )[task]
        realised = self._lm.realised.sparsity if schedule else 0.0
        self._lm.use(None)
        return {**scores, "nominal": schedule.sparsity if schedule else 0.0, "realised": realised}


def _chosen(table: "PublishedTable", only: Sequence[str] | None) -> tuple[str, ...]:
    """The measures that are asked for, in the table's order."""
    names = options.parse_names(only)
    for name in names:
        if name not in table.measures:
            raise typer.BadParameter(
                f"{table.name} has no {name!r}{suggestion(name, table.measures)}; it has {', '.join(table.measures)}",
                param_hint="'--only'",
            )
    return tuple(each for each in table.measures if not names or each in names)


def _copies(table: "PublishedTable", given: Sequence[str] | None) -> dict[str, str]:
    """What `read_dataset` is given for data sets that have a local copy."""
    found = {}
    for each in given or []:
        name, equals, path = each.partition("=")
        if not equals or name not in table.datasets:
            raise typer.BadParameter(
                f"{each!r} is no copy of a data set of {table.name}{suggestion(name, table.datasets)}; expected "
                f"{' or '.join(f'{name}=PATH' for name in table.datasets)}",
                param_hint="'--dataset'",
            )
        if not Path(path).exists():
            raise FileNotFoundError(2, "there is no such copy of the data set", path)
        found[name] = each
    return found


def _variants(table: "PublishedTable", given: Sequence[Path] | None) -> "list[tuple[Path, Schedule] | None]":
    """The schedule of each level, None of the dense model."""
    from was_fx import load_published

    names = [level.schedule for level in table.levels if level.schedule]
    if given and len(given) != len(names):
        raise typer.BadParameter(
            f"{len(given)} given, but {table.name} has {len(names)} sparse: {', '.join(names)}; give as many",
            param_hint="'--schedule'",
        )
    paths = given or [Path(name) for name in names]
    schedules = iter([(path, load_schedule(path) if given else load_published(str(path))) for path in paths])
    return [next(schedules) if level.schedule else None for level in table.levels]


def _check_shapes(table: "PublishedTable", model: str, variants: "Sequence[tuple[Path, Schedule]]", own: bool) -> None:
    """Say that schedules don't fit before weights are loaded, by the model's configuration alone."""
    from was_fx.modules.linears import find_linears
    from was_fx.schedules.errors import ScheduleError
    from was_fx.sparse import schedule_fit

    skeleton = load_skeleton(model)
    linears = find_linears(skeleton)
    for path, schedule in variants:
        try:
            schedule_fit.fitted(skeleton, schedule, linears, allow_other_model=True)
        except ScheduleError as error:
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            remedy = "give one of this model" if own else f"give a copy of {table.model}, or a --schedule of your own"
            raise ValueError(f"the schedule {path} doesn't fit {model}: {error.problems[0]}{more}; {remedy}") from error


def _row(level: float, path: Path | None, published: "PublishedValue", found: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` prints of a number."""
    from was_fx.choosing.score_changes import error_key

    if published.metric not in found:
        raise ValueError(
            f"{published.measure} gave no {published.metric}, but {', '.join(found)}; is it the task of that name?"
        )
    ours, error = found[published.metric], found.get(error_key(published.metric))
    error = error if isinstance(error, float) else None
    difference = ours - published.value
    both = math.hypot(error, published.error) if error and published.error else None
    return {
        "level": level,
        "schedule": str(path) if path else None,
        "measure": published.measure,
        "metric": published.metric,
        "published": published.value,
        "published_error": published.error,
        "ours": ours,
        "error": error,
        "difference": difference,
        "errors": difference / both if both else None,
        "nominal": found["nominal"],
        "realised": found["realised"],
    }


def _level(level: float) -> str:
    return f"{100 * level:g} %" if level else DENSE


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("measured", "level", "published", "ours", "differs", "errors", "realised")
    shown = len(columns) if stdout().width >= ROOMY else 5
    table = new_table(*columns[:shown])
    for row in rows:
        share = row["metric"] != "perplexity"
        metric, digits = row["metric"].removesuffix(",none").replace(",", ", "), 4 if share else 3
        cells = (
            f"{row['measure']} {metric}",
            _level(row["level"]),
            f"{row['published']:.{digits}f}",
            f"{row['ours']:.{digits}f}",
            f"{100 * row['difference']:+.1f}" if share else f"{row['difference']:+.3f}",
            "–" if row["errors"] is None else f"{row['errors']:+.1f}",
            percent(row["realised"]) if row["schedule"] else "–",
        )
        table.add_row(*cells[:shown])
    stdout().print(table)
    if any(row["metric"] != "perplexity" for row in rows):
        errors = ", and in standard errors of both numbers together" if shown == len(columns) else ""
        note(f"Differences of accuracies are in points{errors}.", style="dim")


def _list(json: bool) -> None:
    from was_fx.schedules.released.tables import published_tables

    tables = published_tables()
    if json:
        entries = [
            {
                "name": each.name,
                "model": each.model,
                "levels": [level.level for level in each.levels],
                "schedules": [level.schedule for level in each.levels if level.schedule],
                "convention": each.convention,
                "datasets": each.datasets,
                "tasks": each.tasks,
                "fewshot": each.fewshot,
                "source": each.source,
            }
            for each in tables
        ]
        print_json({"tables": entries})
        return
    for each in tables:
        say(each.name, style="bold")
        say(f"  model       {each.model}, and its weights")
        say(f"  levels      {', '.join(_level(level.level) for level in each.levels)}")
        say(f"  perplexity  {', '.join(each.datasets)}, by the convention {each.convention}")
        if each.tasks:
            say(f"  tasks       {', '.join(each.tasks)}; {each.fewshot} examples in the prompt; lm-eval")
        say(f"  source      {each.source}")
    say(f"Next: was reproduce {tables[0].name} --model {shlex.quote(tables[0].model)} --log table.jsonl")

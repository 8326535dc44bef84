"""The page of `was report`: one HTML file that loads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from markupsafe import Markup

from was_fx import Calibration, Schedule
from was_fx.choosing.choices import Choice
from was_fx.choosing.decision import Decision
from was_fx.cli.input.compare_inputs import Trials
from was_fx.cli.input.eval_results import TaskResults
from was_fx.cli.page import svg, tradeoff, words
from was_fx.cli.page.heatmap import heatmap
from was_fx.cli.page.histograms import Histograms, histograms
from was_fx.cli.page.history import history
from was_fx.cli.page.texts import difference, marked
from was_fx.cli.render.contents import source_line
from was_fx.cli.render.grid import short_names
from was_fx.cli.render.tables import percent
from was_fx.schedules.experts import groups
from was_fx.schedules.names import by_block, visible
from was_fx.schedules.weight_formats import describe
from was_fx.version import __version__

_HERE = Path(__file__).parent
_NONE = "–"
# How much the dense model's time may differ from format to format before the page speaks of it.
_STEADY = 1.15
# And how much the repetitions of a choice may, as a share of their median.
_SPREAD = 0.4


@dataclass(frozen=True)
class Report:
    """What a page shows; a section with nothing to show is left out.

    Attributes:
        model: what the user called it.
        text: what the losses were measured on.
        setting: how, in a sentence.
        choices: of every format, without a schedule first, and then with each.
        decision: which of them to take.
        schedules: by the names that choices have.
        prompts: what `Choice.texts` go on from.
        calibration: whose scores are drawn.
        evaluations: results of `was eval`.
        searches: trials of searches.
        environment: what it was measured on and with.
        command: that made the page.
    """

    model: str
    text: str
    setting: str
    choices: Sequence[Choice]
    decision: Decision
    schedules: Mapping[str, Schedule]
    prompts: Sequence[str]
    calibration: Calibration | None
    evaluations: Sequence[TaskResults]
    searches: Sequence[Trials]
    environment: Mapping[str, str]
    command: str


def render(report: Report) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(
        report=report,
        version=__version__,
        css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "report.js").read_text(encoding="utf-8")),
        kinds=svg.KINDS,
        marks=[_glyph(kind) for kind in range(svg.KINDS)],
        line=Markup('<path d="M0 8H16" stroke="currentColor" stroke-width="3"/>'),
        headline=words.headline(report.decision),
        tiles=_tiles(report.decision),
        setting=report.setting,
        **_choices(report),
        heatmaps=[_heatmap(report, name) for name in report.schedules],
        **_histograms(report),
        evaluations=[_tasks(each) for each in report.evaluations],
        samples=_samples(report) if report.schedules else [],
        **_searches(report.searches),
    )


def _shown(value: Any) -> Any:
    """Names may hold anything: control characters are shown, and everything is escaped after this."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value, keep="\n\t")


def _glyph(kind: int) -> Markup:
    """A mark for the legend, without the element that is drawn in."""
    group = svg.Element("g")
    svg.mark(group, kind, 8, 8)
    return svg.markup(group)


def _row(*cells: Any, chosen: bool = False) -> dict[str, Any]:
    return {"cells": cells, "chosen": chosen}


def _tiles(decision: Decision) -> list[tuple[str, str, str]]:
    """Name, value and a note of the figures under the headline."""
    choice, dense = decision.choice, decision.dense
    if choice is None:
        return []
    read, most = words.size(choice.bytes_per_token), words.size(dense.bytes_per_token)
    found = [
        ("Perplexity", words.cost(choice, dense), f"{choice.perplexity:.2f}, dense {dense.perplexity:.2f}"),
        ("Weights read per token", read, f"dense {most}"),
    ]
    if choice.schedule is not None:
        found.append(("Sparsity realised", percent(choice.realised), f"nominal {percent(choice.nominal)}"))
    if choice.ratio is None:
        return found
    times = f"{choice.ms_per_token:.1f} ms per token, dense {choice.dense_ms:.1f}"
    return [("Speed", f"{choice.ratio:.2f}×", times), *found]


def _choices(report: Report) -> dict[str, Any]:
    choices, decision = report.choices, report.decision
    formats = list(dict.fromkeys(each.format for each in choices))
    kinds = {name: position for position, name in enumerate(formats)}
    timed = decision.dense.ms_per_token is not None
    drawings = [tradeoff.by_bytes(choices, decision, kinds)]
    if timed:
        drawings.append(tradeoff.by_speed(choices, decision, kinds))
    columns = ["weights", "schedule", "nominal", "realised", "loss", "perplexity", "change", "read"]
    rows = []
    for each in choices:
        shares = (percent(each.nominal), percent(each.realised)) if each.schedule else (_NONE, _NONE)
        speed = [f"{tradeoff.speed(each, decision.dense):.1f}", f"{each.ratio:.2f}×"] if timed else []
        rows.append(
            _row(
                each.format,
                each.schedule or "dense",
                *shares,
                f"{each.loss:.4f}",
                f"{each.perplexity:.2f}",
                _NONE if each is decision.dense else words.cost(each, decision.dense),
                words.size(each.bytes_per_token),
                *speed,
                chosen=each is decision.choice,
            )
        )
    return {
        "formats": formats,
        "tradeoffs": drawings,
        "choice_columns": columns + (["tokens/s", "speed-up"] if timed else []),
        "choice_rows": rows,
        "notes": _notes(report, timed),
    }


def _notes(report: Report, timed: bool) -> list[str]:
    found = [
        "change: of perplexity against the dense model as it was loaded. read: weight bytes for one token, the head's "
        "included."
    ]
    if timed:
        found.append(
            "speed-up: of one sequence, against the dense model as it was loaded, timed in turns with it. tokens/s: "
            "those of the dense model times the speed-up."
        )
        found += _unsteady(report.choices)
    if len({each.format for each in report.choices}) > 1:
        made = {
            describe(each.metadata.weights) for each in report.schedules.values() if each.metadata.weights is not None
        }
        found += [
            f"Thresholds come from a model that was {each}, and are the same in every format." for each in sorted(made)
        ]
    return found


def _unsteady(choices: Sequence[Choice]) -> list[str]:
    """That speeds are rough, where the same thing took unequal times."""
    times = [each.dense_ms for each in choices if each.dense_ms is not None]
    spreads = [(max(each.repetitions) - min(each.repetitions)) / median(each.repetitions) for each in choices]
    if max(times) <= _STEADY * min(times) and median(spreads) <= _SPREAD:
        return []
    dense = f"the dense model took from {min(times):.1f} to {max(times):.1f} ms per token beside one format or another"
    spread = f"repetitions of a choice differed by {100 * median(spreads):.0f} % (median)"
    return [f"Speeds are rough, for this machine was busy: {dense}, and {spread}."]


def _heatmap(report: Report, name: str) -> dict[str, Any]:
    schedule = report.schedules[name]
    nominal = {linear: each.sparsity for linear, each in schedule.linears.items()}
    drawings = [(f"nominal, {percent(schedule.sparsity)} in all", heatmap(f"Nominal sparsity of {name}", nominal))]
    for choice in report.choices:
        if choice.schedule == name:
            title = f"realised with {choice.format} weights, {percent(choice.realised)} in all"
            drawings.append((title, heatmap(title, choice.linears)))
            break
    means = {group: sum(nominal[each] for each in names) / len(names) for group, names in groups(nominal).items()}
    rows, others = by_block(means)
    projections = short_names(projection for row in rows.values() for projection in row)
    cells = [
        _row(
            f"{prefix}.{block}",
            *(f"{100 * row[each]:.1f}" if each in row else "·" for each in projections),
        )
        for (prefix, block), row in rows.items()
    ]
    cells += [_row(other, f"{100 * share:.1f}", *[""] * (len(projections) - 1)) for other, share in others.items()]
    return {
        "name": name,
        "origin": _origin(schedule),
        "drawings": drawings,
        "columns": ["block", *projections.values()] if projections else ["Linear", "sparsity"],
        "rows": cells,
    }


def _origin(schedule: Schedule) -> str:
    """Where a schedule comes from, in a line."""
    meta = schedule.metadata
    parts = [
        f"recipe {meta.recipe}" + ("" if meta.seed is None else f", seed {meta.seed}"),
        "" if meta.target is None else f"target {percent(meta.target)}",
        source_line(meta.source) if meta.source else "",
        f"thresholds from {meta.calibration_text}" if meta.calibration_text else "",
        f"{meta.calibration_tokens:,} tokens" if meta.calibration_tokens else "",
        "" if meta.weights is None else f"weights {describe(meta.weights)}",
        f"was-fx {meta.tool_version}",
    ]
    return "; ".join(part for part in parts if part)


def _histograms(report: Report) -> dict[str, Any]:
    found: Histograms | None = None
    if report.calibration is not None:
        found = histograms(report.calibration, report.schedules)
    return {"histograms": found, "cut_names": list(report.schedules)}


def _tasks(results: TaskResults) -> dict[str, Any]:
    names = results.names
    rows = []
    for (task, metric), scores in results.scores.items():
        dense = scores.get("dense")
        cells = []
        for name in names:
            score = scores.get(name)
            if score is None:
                cells.append(_NONE)
                continue
            error = "" if score.error is None else f" ± {score.error:.3f}"
            drop = "" if name == "dense" or dense is None else f" ({100 * (score.value - dense.value):+.1f})"
            cells.append(f"{score.value:.3f}{error}{drop}".replace("-", "−"))
        rows.append(_row(f"{task}, {metric}", *cells))
    return {"setting": results.setting, "columns": ["task", *names], "rows": rows}


def _samples(report: Report) -> list[dict[str, Any]]:
    """Of every prompt the dense text beside that of the decision, and those of all others."""
    decision = report.decision
    first = decision.choice or next(each for each in report.choices if each.schedule)
    found = []
    for at, prompt in enumerate(report.prompts):
        dense = decision.dense.texts[at]

        def card(choice: Choice, at: int = at, dense: str = dense) -> dict[str, Any]:
            text = choice.texts[at]
            return {"name": tradeoff.label(choice), "text": marked(text, dense), "note": difference(text, dense)}

        others = [each for each in report.choices if each is not decision.dense and each is not first]
        left = {"name": tradeoff.label(decision.dense), "text": marked(dense, first.texts[at]), "note": ""}
        found.append({"prompt": prompt, "first": [left, card(first)], "others": [card(each) for each in others]})
    return found


def _searches(searches: Sequence[Trials]) -> dict[str, Any]:
    rows = []
    for each in searches:
        index, loss = each.best
        first = next(each.losses[at] for at in range(len(each.losses)) if each.losses[at] == each.losses[at])
        target = _NONE if each.target is None else percent(each.target)
        rows.append(_row(each.path.name, target, str(len(each.losses)), f"{first:.4f}", f"{loss:.4f}", str(index)))
    return {
        "searches": rows,
        "search_names": [each.path.name for each in searches],
        "search_drawing": history(searches) if searches else "",
    }

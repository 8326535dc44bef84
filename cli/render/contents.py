"""What is in a schedule or a calibration: drawn, and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from was_fx.cli.render.budget import show_budget
from was_fx.cli.render.grid import Cell, draw, short_names
from was_fx.cli.render.tables import new_table, percent, significant
from was_fx.schedules.decode_time import BYTES, Prediction, known_gpus, predict, read_range
from was_fx.schedules.experts import groups, is_member
from was_fx.schedules.names import split_name, visible
from was_fx.schedules.summary import (
    Part,
    block_count,
    by_depth,
    by_projection,
    group_means,
    part,
    warnings,
    weights_format,
)
from was_fx.schedules.weight_formats import describe

if TYPE_CHECKING:
    from was_fx import Calibration, Schedule
    from was_fx.cli.input.compare_inputs import Measured

# Sparsities whose thresholds are shown of a calibration.
QUANTILES = (0.25, 0.5, 0.75, 0.9)


def show_schedule(
    console: Console,
    name: str,
    schedule: "Schedule",
    *,
    thresholds: bool = False,
    measured: "Measured | None" = None,
    rest: float | None = None,
    gpus: Sequence[str] | None = None,
) -> None:
    """Draw blocks × projections, the budget, what it will take and where the schedule comes from.

    Args:
        console: where.
        name: what the user called the schedule.
        schedule: which.
        thresholds: of the Linears in place of their sparsities.
        measured: its row of `was ppl`.
        rest: weights of the model's other Linears, which a token reads whole; None if that is not known.
        gpus: to predict a decode step on; by default all that something is known about.
    """
    what = "thresholds τ" if thresholds else "sparsity in %"
    console.print(visible(f"{name}: {what}"), style="bold", soft_wrap=True)
    draw(console, _threshold_cells(schedule) if thresholds else _sparsity_cells(schedule))
    show_budget(console, schedule)
    for warning in warnings(schedule):
        console.print(Text.assemble(("! ", "bold yellow"), visible(warning)))
    linears, meta = schedule.linears, schedule.metadata
    weights = part(schedule)
    target = "no target" if meta.target is None else f"target {100 * meta.target:.4g} %"
    excluded = f", {len(meta.excluded)} left dense on purpose" if meta.excluded else ""
    scores = sorted({str(schedule.score(name)) for name in linears})
    each = BYTES[weights_format(meta.weights)]
    experts = sum(is_member(name) for name in linears)
    lines = {
        "budget": f"{100 * schedule.sparsity:.2f} % nominal, {target}",
        "": f"{_count(weights.dropped)} of {_count(weights.weights)} scheduled weights not read per token",
        " ": f"({_count(each * weights.dropped)}B less in {weights_format(meta.weights)}); {_share(weights, rest)}",
        "realised": _realised(measured),
        **_speed_lines(schedule, rest, gpus),
        "linears": f"{len(linears)} scheduled{excluded}",
        **({"experts": f"{experts} matrices; a cell is the mean of all experts of a parameter"} if experts else {}),
        **({"source": source_line(meta.source)} if meta.source else {}),
        "recipe": meta.recipe + ("" if meta.seed is None else f", seed {meta.seed}"),
        "score": scores[0] if len(scores) == 1 else f"{len(scores)} different, {scores[0]} … {scores[-1]}",
        "text": _text(meta.calibration_text, meta.calibration_tokens),
        "model": _fingerprint(meta.fingerprint),
        **_weights(meta.weights),
        "was-fx": meta.tool_version or "unknown",
    }
    _show_lines(console, lines)


def _sparsity_cells(schedule: "Schedule") -> dict[str, Cell]:
    return {name: (f"{100 * mean:.1f}", mean) for name, mean in group_means(schedule).items()}


def _threshold_cells(schedule: "Schedule") -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for group, names in groups(schedule.linears).items():
        values = sorted({schedule.linears[name].threshold for name in names})
        ends = dict.fromkeys(significant(value, 3) for value in (values[0], values[-1]))
        cells[group] = "…".join(ends), None
    return cells


def predictions(
    schedule: "Schedule", rest: float | None, gpus: Sequence[str] | None
) -> tuple[list[Prediction], dict[str, str]]:
    """Decode steps with a schedule, and by GPU why there is none; arguments as for `show_schedule`."""
    chosen = known_gpus() if gpus is None else gpus
    format, total = weights_format(schedule.metadata.weights), part(schedule)
    if any(is_member(name) for name in schedule.linears):
        return [], dict.fromkeys(chosen, "no step of a model with experts is among the measured ones")
    if format not in BYTES:
        return [], dict.fromkeys(chosen, f"no step with weights in {format} is among the measured ones")
    head = rest or 0.0
    read = BYTES[format] * (total.weights - total.dropped) + (2.0 if format == "bf16" else 1.0) * head
    found, reasons = [], {}
    for gpu in chosen:
        least, most = read_range(gpu, format)
        if least <= read <= most:
            found.append(predict(gpu, format, block_count(schedule), read, 2.0 * (total.weights + head)))
        else:
            measured = f"{least / 1e9:.1f} to {most / 1e9:.1f}"
            reasons[gpu] = f"a token reads {read / 1e9:.3g} GB; steps of {measured} GB can be told"
    return found, reasons


def _speed_lines(schedule: "Schedule", rest: float | None, gpus: Sequence[str] | None) -> dict[str, str]:
    found, reasons = predictions(schedule, rest, gpus)
    texts = []
    for each in found:
        ahead = f", dense {each.dense_ms:.2f} ms ({each.dense_ms / each.ms:.2f}×)" if each.dense_ms else ""
        texts.append(f"{each.gpu}: {each.ms:.2f} ms per token predicted{ahead}")
    for gpu, reason in reasons.items():
        texts += [f"{gpu}: not predicted,", reason]
    if found:
        models = dict.fromkeys(model for each in found for model in each.models)
        miss = 100 * max(each.miss for each in found)
        texts += ["from steps measured with shapes of", f"{', '.join(models)};"]
        texts += [f"it meets these within {miss:.0f} %; at the nominal sparsity"]
        if rest is None:
            texts.append("(without the head, which a schedule doesn't know: --model MODEL)")
    return {"speed" if not at else " " * (2 + at): text for at, text in enumerate(texts)}


def _share(weights: Part, rest: float | None) -> str:
    if rest is None:
        return "the head is never scheduled by default"
    return f"{percent(weights.dropped / (weights.weights + rest))} of all weights that a token reads"


def _realised(measured: "Measured | None") -> str:
    if measured is None:
        return "not measured; was ppl MODEL --schedule FILE --json tells, then --ppl"
    saved = f"{percent(measured.bytes_saved)} of all weight bytes not read"
    return f"{percent(measured.realised)}, {saved}, perplexity {measured.perplexity:.2f}"


def show_calibration(console: Console, name: str, calibration: "Calibration") -> None:
    """Draw the threshold of some sparsities for each Linear, and where the calibration comes from."""
    console.print(visible(f"{name}: threshold τ that drops …"), style="bold", soft_wrap=True)
    split = {each: split_name(each) for each in calibration.thresholds}
    short = short_names(projection for _, projection in split.values())
    table = new_table("block", "Linear", "[N, K]", *(f"{100 * level:.0f} %" for level in QUANTILES), texts=2)
    last = float(calibration.levels[-1])
    for each, (block, projection) in split.items():
        n, k = calibration.shapes[each]
        values = [significant(calibration.threshold(each, q), 4) if q <= last else "–" for q in QUANTILES]
        table.add_row("" if block is None else str(block), short[projection], f"{n} × {k}", *values)
    console.print(table)
    lines = {
        "linears": str(len(split)),
        "score": str(calibration.score),
        "text": _text(calibration.text, calibration.tokens),
        "model": _fingerprint(calibration.fingerprint),
        **_weights(calibration.weights),
    }
    _show_lines(console, lines)


def source_line(source: Mapping[str, Any]) -> str:
    """Where a schedule that others released comes from, in a line."""
    level = source.get("level")
    parts = [
        f"{source.get('method', 'unknown')} for {source.get('model') or source.get('folder') or 'unknown'}",
        f"released as {100 * level:.4g} %" if isinstance(level, (int, float)) else "",
        str(source.get("repository", "")),
        str(source.get("licence", "")),
    ]
    return ", ".join(part for part in parts if part)


def schedule_json(path: str, schedule: "Schedule") -> dict[str, Any]:
    """Everything in a schedule but its tensors, for `--json`."""
    linears = {
        name: {
            "sparsity": each.sparsity,
            "threshold": each.threshold,
            "exponent": each.exponent,
            "shape": list(schedule.shapes[name]),
        }
        for name, each in schedule.linears.items()
    }
    return {
        "kind": "schedule",
        "path": path,
        "sparsity": schedule.sparsity,
        "weights": part(schedule).weights,
        "dropped": part(schedule).dropped,
        "projections": {key: each.sparsity for key, each in by_projection(schedule).items()},
        "depth": {key: each.sparsity for key, each in by_depth(schedule).items()},
        "warnings": warnings(schedule),
        "norm": schedule.norm,
        "metadata": dataclasses.asdict(schedule.metadata),
        "linears": linears,
    }


def calibration_json(path: str, calibration: "Calibration") -> dict[str, Any]:
    """What a calibration holds, with the thresholds of `QUANTILES`, for `--json`."""
    last = float(calibration.levels[-1])
    linears = {
        name: {
            "shape": list(calibration.shapes[name]),
            "thresholds": {str(q): calibration.threshold(name, q) for q in QUANTILES if q <= last},
        }
        for name in calibration.thresholds
    }
    return {
        "kind": "calibration",
        "path": path,
        "score": {"exponent": calibration.score.exponent, "norm": calibration.score.norm},
        "tokens": calibration.tokens,
        "text": calibration.text,
        "fingerprint": dict(calibration.fingerprint),
        "weights": calibration.weights and dict(calibration.weights),
        "linears": linears,
    }


def _show_lines(console: Console, lines: Mapping[str, str]) -> None:
    if console.is_terminal:  # elsewhere long lines stay whole, for whoever reads them by program
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, text in lines.items():
            table.add_row(key.strip().ljust(8), visible(text))
        console.print(table)
        return
    for key, text in lines.items():
        console.print(f"{key.strip():<8} ", style="bold", end="")
        console.print(visible(text), soft_wrap=True)


def _text(text: str, tokens: int) -> str:
    return f"{text or 'unknown'}, {tokens:,} tokens" if tokens else text or "unknown"


def _fingerprint(fingerprint: Mapping[str, Any]) -> str:
    if not fingerprint:
        return "any (no fingerprint)"
    weights = f"weights {str(fingerprint['weights'])[:12]}" if "weights" in fingerprint else "by its shapes only"
    return f"{fingerprint.get('architecture', 'unknown')}, {weights}"


def _weights(formats: Mapping[str, str] | None) -> dict[str, str]:
    return {} if formats is None else {"weights": describe(formats)}


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "

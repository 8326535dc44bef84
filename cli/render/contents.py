"""What is in a schedule or a calibration: drawn, and as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from was_fx.cli.render.grid import draw, short_names
from was_fx.cli.render.tables import new_table, significant
from was_fx.schedules.names import split_name, visible
from was_fx.schedules.weight_formats import describe

if TYPE_CHECKING:
    from was_fx import Calibration, Schedule

# Sparsities whose thresholds are shown of a calibration.
QUANTILES = (0.25, 0.5, 0.75, 0.9)


def show_schedule(console: Console, name: str, schedule: "Schedule", *, thresholds: bool = False) -> None:
    """Draw blocks × projections, the budget and where the schedule comes from."""
    what = "thresholds τ" if thresholds else "sparsity in %"
    console.print(visible(f"{name}: {what}"), style="bold", soft_wrap=True)
    linears = schedule.linears
    if thresholds:
        draw(console, {name: (significant(linear.threshold, 3), None) for name, linear in linears.items()})
    else:
        draw(console, {name: (f"{100 * each.sparsity:.1f}", each.sparsity) for name, each in linears.items()})
    weights = sum(n * k for n, k in schedule.shapes.values())
    skipped = weights * schedule.sparsity
    meta = schedule.metadata
    target = "no target" if meta.target is None else f"target {100 * meta.target:.4g} %"
    excluded = f", {len(meta.excluded)} left dense on purpose" if meta.excluded else ""
    scores = sorted({str(schedule.score(name)) for name in linears})
    lines = {
        "budget": f"{100 * schedule.sparsity:.2f} % nominal, {target}",
        "": f"{_count(skipped)} of {_count(weights)} scheduled weights not read per token",
        " ": f"({_count(2 * skipped)}B less in bf16); the head is never scheduled by default",
        "linears": f"{len(linears)} scheduled{excluded}",
        **({"source": source_line(meta.source)} if meta.source else {}),
        "recipe": meta.recipe + ("" if meta.seed is None else f", seed {meta.seed}"),
        "score": scores[0] if len(scores) == 1 else f"{len(scores)} different, {scores[0]} … {scores[-1]}",
        "text": _text(meta.calibration_text, meta.calibration_tokens),
        "model": _fingerprint(meta.fingerprint),
        **_weights(meta.weights),
        "was-fx": meta.tool_version or "unknown",
    }
    _show_lines(console, lines)


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

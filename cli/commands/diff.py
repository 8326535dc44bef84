"""`was diff`: what two schedules give to each Linear."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from was_fx.cli.input import options
from was_fx.cli.input.files import load_schedule
from was_fx.cli.render.console import print_json, stdout
from was_fx.cli.render.difference import depths, show_difference
from was_fx.schedules.summary import by_projection, group_means

if TYPE_CHECKING:
    from was_fx import Schedule

EXAMPLES = options.examples(
    "was diff s50.was.safetensors f50.was.safetensors",
    "was diff was-llama-2-7b-60 was-llama-2-7b-75  [dim]published ones, by name[/]",
    "was diff s50.was.safetensors f50.was.safetensors --json",
)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A schedule: a file, or a name of `was published list`.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
    json: options.Json = False,
) -> None:
    """Show where two schedules differ: by Linear, projection and depth, in budget and origin.

    Differences are B minus A, in points of sparsity. Linears that only one of them schedules count as dense in the
    other.
    """
    first, second = load_schedule(a), load_schedule(b)
    if not set(first.linears) & set(second.linears):
        raise ValueError(f"{a} and {b} have no Linear in common; they are for different models")
    if json:
        print_json(_as_json(str(a), first, str(b), second))
    else:
        show_difference(stdout(), a.name, first, b.name, second)


def _as_json(a: str, first: "Schedule", b: str, second: "Schedule") -> dict[str, Any]:
    before, after = dataclasses.asdict(first.metadata), dataclasses.asdict(second.metadata)
    means = group_means(first), group_means(second)
    return {
        "a": {"schedule": a, "sparsity": first.sparsity, "norm": first.norm},
        "b": {"schedule": b, "sparsity": second.sparsity, "norm": second.norm},
        "linears": _pairs(*means),
        "projections": _pairs(*({k: p.sparsity for k, p in by_projection(each).items()} for each in (first, second))),
        "depth": _pairs(*depths(first, second)),
        "same_thresholds": first.linears == second.linears,
        "metadata": {key: [before[key], after[key]] for key in before if before[key] != after[key]},
    }


def _pairs(a: dict[str, float], b: dict[str, float]) -> dict[str, dict[str, float | None]]:
    keys = dict.fromkeys([*a, *b])
    return {key: {"a": a.get(key), "b": b.get(key), "change": b.get(key, 0.0) - a.get(key, 0.0)} for key in keys}

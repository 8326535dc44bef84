"""Formats of weights, as `--weights` gives them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from was_fx.cli.render.console import progress

if TYPE_CHECKING:
    from was_fx.sparse.weight_plan import Weights


def parse_weights(given: Sequence[str] | None, option: str = "--weights") -> "Weights | None":
    """What `was_fx.quantize` takes: a format, or formats by pattern with that of all others as "*"; None of nothing.

    Raises:
        typer.BadParameter: a format is not known, or a pattern or all others are given twice.
    """
    if not given:
        return None
    from was_fx.sparse.weight_plan import ALL_OTHERS, parse_format

    found: dict[str, str] = {}
    for each in given:
        before, equals, format = each.rpartition("=")
        pattern = before if equals else ALL_OTHERS
        try:
            parse_format(format)
        except ValueError as error:
            hint = "" if equals else ", or PATTERN=FORMAT for some Linears"
            raise typer.BadParameter(f"{error}{hint}", param_hint=f"'{option}'") from None
        if pattern in found:
            what = "all Linears" if pattern == ALL_OTHERS else repr(pattern)
            raise typer.BadParameter(
                f"the format of {what} is given twice: {found[pattern]}, {format}", param_hint=f"'{option}'"
            )
        found[pattern] = format
    return found


def parse_formats(given: Sequence[str] | None) -> "dict[str, Weights]":
    """Several formats of the whole model by what was given: each one, `int4,*.down_proj=int8`, as `parse_weights`.

    Raises:
        typer.BadParameter: one is not valid, or is given twice.
    """
    found: dict[str, Weights] = {}
    for each in given or []:
        if each in found:
            raise typer.BadParameter(f"{each} is given twice", param_hint="'--weights'")
        plan = parse_weights([part.strip() for part in each.split(",")])
        assert plan is not None
        found[each] = plan
    return found


def quantise(model: Any, name: str, weights: "Weights", **arguments: Any) -> None:
    """Quantise a model in place, and say so meanwhile; arguments as for `was_fx.quantize`.

    Raises:
        ValueError: it is quantised already, or can't be.
    """
    import was_fx
    from was_fx.modules.quantized_linear import weight_formats

    known = set(weight_formats(model).values())
    if known:
        raise ValueError(
            f"{name} is quantised already ({', '.join(sorted(known))}); leave out --weights, or give the checkpoint "
            "that it was made of"
        )
    with progress("Quantising") as advance:
        was_fx.quantize(model, weights, progress=advance, **arguments)

"""Which format each weight of a model is to have, by what a user says: a format, or formats by patterns of names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from was_fx.kernels.quantized.rows import GROUPS, INT4, INT8
from was_fx.modules.linears import LinearModule
from was_fx.modules.quantized_embedding import TIED, QuantizedEmbedding, input_embedding, is_tied, why_not
from was_fx.modules.quantized_linear import format_name, group_of
from was_fx.modules.text_decoder import TextDecoder
from was_fx.schedules.experts import group_of as group_of_name
from was_fx.schedules.experts import groups, is_member

Weights = str | Mapping[str, str]

ALL_OTHERS = "*"
NONE = "none"
_KNOWN = {INT8: INT8, INT4: f"{INT4}-{GROUPS[0]}", **{f"{INT4}-{g}": f"{INT4}-{g}" for g in GROUPS}, NONE: NONE}


def planned(model: nn.Module, linears: Mapping[str, LinearModule], weights: Weights) -> dict[str, str]:
    """The format of each Linear that is to be quantised and is not yet: "int8", or "int4-32" with another group; and of
    the input embeddings, for which "tied" stands beside them.

    Raises:
        ValueError: a format is not known, a pattern fits no Linear, a weight has another format already, or the
            embeddings can't have the one that their name was given.
    """
    patterns = {ALL_OTHERS: weights} if isinstance(weights, str) else dict(weights)
    patterns = {pattern: parse_format(format) for pattern, format in patterns.items()}
    rest = patterns.pop(ALL_OTHERS, NONE)
    embedding = input_embedding(model)
    names = [*linears, *([] if embedding is None else [embedding[0]])]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(
                f"weights names {pattern!r}, which fits no Linear; there is {', '.join(list(linears)[:4])}, …"
            )
    decoder = TextDecoder(model)  # what lies outside of it is quantised only if it is asked for by name
    found = {}
    for name, linear in linears.items():
        others = rest if linear.head or decoder.holds(name) else NONE
        others = INT8 if linear.head and rest != NONE else others
        format = _asked(name, patterns) or others
        if format == NONE:
            continue
        if linear.rows is None:
            found[name] = format
        elif format_name(linear.rows) != format:
            raise ValueError(_another(name, format_name(linear.rows), format))
    for group, members in groups(linears).items():
        if is_member(members[0]) and len({found.get(name) for name in members}) > 1:
            raise ValueError(f"weights names some experts of {group}; all that one parameter holds need one format")
    if embedding is not None:
        name, module = embedding
        head = next((linear for linear in linears.values() if linear.head), None)
        format = _embedding_format(name, module, head, found, _asked(name, patterns), name in patterns, rest)
        if format != NONE and (name in patterns or _leaves_parameters(model, linears, found, module)):
            found[name] = format
    return found


def _asked(name: str, patterns: Mapping[str, str]) -> str | None:
    """The format by the first pattern that fits a name."""
    return next((format for pattern, format in patterns.items() if _fits(name, pattern)), None)


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name, or the parameter that holds an expert."""
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(group_of_name(name), pattern)


def _embedding_format(
    name: str,
    module: Any,
    head: LinearModule | None,
    found: Mapping[str, str],
    asked: str | None,
    by_name: bool,
    rest: str,
) -> str:
    """What embeddings that are not quantised yet become: a format, "tied" or "none".

    Raises:
        ValueError: they can't have the format that was asked for by their name.
    """
    if isinstance(module, QuantizedEmbedding):
        known = format_name(module.was_rows)
        if by_name and asked not in (NONE, known):
            raise ValueError(_another(name, known, str(asked)))
        return NONE
    tied = is_tied(module, head)
    whole = found.get(head.name, NONE) if head is not None and tied else None
    if tied and head is not None and by_name and asked not in (NONE, whole):
        raise ValueError(
            f"{name} shares its weight with {head.name}, which is to be {whole}: leave it out to let it follow, or "
            f"give {head.name} the same format"
        )
    if whole is not None:
        format = NONE if NONE in (asked, whole) else TIED
    else:
        format = asked or (rest if head is not None else NONE)
        if asked is None and format not in (NONE, INT8) and module.num_embeddings % group_of(format):
            format = INT8
    reason = why_not(module) if format != NONE else ""
    if reason and by_name:
        raise ValueError(f"{name} can't be quantised: {reason}; give it the format {NONE!r}")
    return NONE if reason else format


def _leaves_parameters(
    model: nn.Module, linears: Mapping[str, LinearModule], found: Mapping[str, str], module: Any
) -> bool:
    """Whether a model keeps a Parameter, by which transformers tells its dtype and device, without some of them."""
    gone = {id(linears[name].parameter) for name in found} | {id(module._parameters.get("weight"))}
    return any(id(each) not in gone and each.is_floating_point() for each in model.parameters())


def _another(name: str, known: str, format: str) -> str:
    return f"{name} is {known} already, and can't become {format}: load a checkpoint that is not quantised"


def parse_format(format: str) -> str:
    """The format with its group.

    Raises:
        ValueError: lists the formats.
    """
    if format not in _KNOWN:
        raise ValueError(f"the format of weights is {format!r}; expected one of {', '.join(_KNOWN)}")
    return _KNOWN[format]

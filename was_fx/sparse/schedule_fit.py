"""Whether a schedule is one of a model, by the names that the model has.

The text decoder of a multimodal model has the Linears of the text-only class at another place: `model.layers.0…` there
is `model.language_model.layers.0…` here. A schedule of either fits the other.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from was_fx.modules.linears import LinearModule, body_linears
from was_fx.modules.text_decoder import decoder_path
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.fingerprint import differences
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.state import model_fingerprint

_REMEDY = "Use the schedule with the model that it was made for, or make one for this model."


def fitted(
    model: nn.Module,
    schedule: Schedule,
    linears: Mapping[str, LinearModule],
    *,
    allow_other_model: bool = False,
) -> Schedule:
    """A schedule of a model by the names that its Linears have.

    Args:
        model: dense or sparsified.
        schedule: of it, of its text-only class, or of a multimodal model with its text decoder.
        linears: those of the model.
        allow_other_model: do not compare fingerprints.

    Returns:
        The schedule itself, if the names are the model's.

    Raises:
        ScheduleError: it doesn't fit; lists every problem, see `Schedule.check`.
    """
    body = body_linears(model)
    shapes = {name: linear.shape for name, linear in linears.items() if name in body or name in schedule.linears}
    if any(name in shapes for name in schedule.linears):
        schedule.check(shapes, model_fingerprint(model, linears), allow_other_model=allow_other_model)
        return schedule
    path = decoder_path(model)
    prefix = _prefix(schedule.linears, {_inside(path, name) for name in body if _under(path, name)})
    if prefix is None:
        problem = f"none of its Linears, such as {next(iter(schedule.linears), 'none')}, is one of the model, such as "
        problem += f"{next(iter(body))}, wherever the decoder may lie"
        raise ScheduleError("the schedule does not fit the model", [problem], _REMEDY)
    head = next((name for name, linear in linears.items() if linear.head), "")
    found = schedule.renamed(_new_names(schedule, prefix, path, head))
    found.check(shapes | {name: linears[name].shape for name in found.linears if name in linears})
    known = schedule.metadata.fingerprint
    if not known or allow_other_model:
        return found
    if not _is_of_these_weights(model, known, linears, prefix, path):
        problem = f"another model: the decoder of {known.get('architecture')} has the same Linears, and other weights"
        remedy = f"{_REMEDY} `allow_other_model=True` skips the comparison of fingerprints."
        raise ScheduleError("the schedule does not fit the model", [problem], remedy)
    return found.replace({}, fingerprint=model_fingerprint(model, linears))


def _prefix(names: Iterable[str], inner: set[str]) -> str | None:
    """What stands before the names of a decoder's Linears, of which one is found in `inner`: names inside a decoder."""
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in inner:
                return ".".join(parts[:start])
    return None


def _new_names(schedule: Schedule, prefix: str, path: str, head: str) -> dict[str, str]:
    """The names that a schedule's Linears have where the decoder lies at `path` and not at `prefix`."""
    names = {}
    for name in (*schedule.linears, *schedule.metadata.excluded, *(schedule.metadata.weights or ())):
        if _under(prefix, name):
            names[name] = _joined(path, _inside(prefix, name))
        elif head and _last(name) == _last(head):
            names[name] = head
        elif name in schedule.linears:
            names[name] = name  # which the model has not
    return names


def _is_of_these_weights(
    model: nn.Module, known: Mapping[str, object], linears: Mapping[str, LinearModule], prefix: str, path: str
) -> bool:
    """Whether a fingerprint is that of this model's decoder and head, by the names that they have there."""
    inside = {_joined(prefix, _inside(path, name)): each for name, each in linears.items() if _under(path, name)}
    head = {name: each for name, each in linears.items() if each.head and not _under(path, name)}
    architecture = str(known.get("architecture"))
    for outer in dict.fromkeys(("", prefix.rpartition(".")[0])):  # where the other model may have its head
        there = inside | {_joined(outer, _last(name)): each for name, each in head.items()}
        if not differences(known, model_fingerprint(model, there, architecture)):
            return True
    return False


def _under(path: str, name: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _inside(path: str, name: str) -> str:
    return name.removeprefix(f"{path}.") if path else name


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _last(name: str) -> str:
    return name.rpartition(".")[2]

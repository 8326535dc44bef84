"""Structured values in the string metadata of a file."""

import json
from collections.abc import Mapping
from typing import Any

from was_fx.schedules.errors import ScheduleError

Shapes = dict[str, tuple[int, int]]


def plain(value: Any, field: str) -> Any:
    """A copy of `value` as a file gives it back: tuples as lists, keys of dicts as strings.

    Raises:
        ScheduleError: if JSON cannot hold it (a tensor, NaN, …).
    """
    return json.loads(to_json(value, field, sort_keys=False))


def to_json(value: Any, field: str, sort_keys: bool = True) -> str:
    """`value` as JSON text; the same text for equal values when `sort_keys` is set.

    Raises:
        ScheduleError: if JSON cannot hold it (a tensor, NaN, …).
    """
    try:
        return json.dumps(value, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"the metadata {field!r} cannot be written as JSON ({error})",
            remedy="Give finite numbers, strings, booleans, lists and dicts of them.",
        ) from error


def is_matrix_shape(shape: object) -> bool:
    """Whether `shape` is a pair (N, K) of positive integers."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        return False
    return all(type(size) is int and size > 0 for size in shape)


class MetadataReader:
    """Typed access to string metadata, which gathers problems instead of raising at the first.

    A value that is missing or of another type is noted in `problems` and given back as `fallback`.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._left = dict(metadata)
        self.problems: list[str] = []

    def text(self, key: str) -> str:
        """The string under `key`."""
        return self._take(key) or ""

    def value(self, key: str, types: type | tuple[type, ...], fallback: Any) -> Any:
        """The JSON value under `key`, which must be an instance of `types` (a bool is no number)."""
        text = self._take(key)
        if text is None:
            return fallback
        try:
            value = json.loads(text, parse_constant=_refuse)
        except ValueError:
            self.problems.append(f"metadata {key!r} is not JSON: {text[:60]!r}")
            return fallback
        types = types if isinstance(types, tuple) else (types,)
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            self.problems.append(f"metadata {key!r} is {text[:60]!r}, expected a value of type {names}")
            return fallback
        return value

    def optional(self, key: str, types: type | tuple[type, ...], fallback: Any) -> Any:
        """As `value`, for a key that older files do not have."""
        return self.value(key, types, fallback) if key in self._left else fallback

    def shapes(self, key: str) -> Shapes:
        """The shapes (N, K) under `key`: a JSON object of pairs of positive integers, order kept."""
        shapes: Shapes = {}
        for name, shape in self.value(key, dict, {}).items():
            if is_matrix_shape(shape):
                shapes[name] = (shape[0], shape[1])
            else:
                self.problems.append(f"metadata {key!r}: {name} has the shape {shape!r}, expected [N, K]")
        return shapes

    def names(self, key: str) -> tuple[str, ...]:
        """The strings under `key`: a JSON list."""
        names = self.value(key, list, [])
        if not all(isinstance(name, str) for name in names):
            self.problems.append(f"metadata {key!r} is {names!r}, expected a list of names")
            return ()
        return tuple(names)

    def formats(self, key: str) -> dict[str, str] | None:
        """The strings by name under `key`, a JSON object; None if the file has none."""
        formats = self.optional(key, dict, None)
        if formats is not None and not all(isinstance(format, str) for format in formats.values()):
            self.problems.append(f"metadata {key!r} is {str(formats)[:60]!r}, expected formats by name")
            return None
        return formats

    def numbers(self, key: str) -> dict[str, float]:
        """The positive numbers by name under `key`, a JSON object that older files do not have."""
        numbers = self.optional(key, dict, {})
        if not all(type(each) in (int, float) and each > 0 for each in numbers.values()):
            self.problems.append(f"metadata {key!r} is {str(numbers)[:60]!r}, expected positive numbers by name")
            return {}
        return numbers

    def finish(self) -> None:
        """Note every key that nothing has asked for."""
        self.problems += [f"unknown metadata {key!r}" for key in sorted(self._left)]

    def _take(self, key: str) -> str | None:
        text = self._left.pop(key, None)
        if text is None:
            self.problems.append(f"metadata {key!r} is missing")
        return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")

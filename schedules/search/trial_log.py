"""The record of a search: a JSON line for its settings and one for every finished trial, to resume from."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.json_lines import append_line, whole_lines

FORMAT = "was-fx search"
_VERSION = 1
_BEGINNING = b'{"format": "was-fx search"'
_REMEDY = "Give the log of a search of was-fx, or start a new one under another path."


class TrialLog:
    """Finished trials by key, kept in a file if there is one.

    A line is written whole and synced before the search goes on, so a kill loses at most the trials under way; the part
    of a line that a kill may leave at the end is dropped.

    Args:
        path: the file; None keeps the trials in memory only.
        settings: all that determines the search: JSON values.
        resume: continue the file if it exists; otherwise it must not exist.

    Raises:
        FileExistsError: the file exists and `resume` is not set.
        ScheduleError: the file is no search log, is damaged, or belongs to a search with other settings; it is then
            left as it is.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self._path = None if path is None else Path(path)
        self._finished: dict[str, dict[str, Any]] = {}
        self._settings = json.loads(json.dumps(dict(settings)))
        if self._path is None:
            return
        if self._path.exists() and not resume:
            raise FileExistsError(
                17, "a search log is here already; resume it, or give another path or remove it", str(self._path)
            )
        if self._path.exists():
            self._read(self._path)
        if not self._path.exists() or not self._path.stat().st_size:
            self._append({"format": FORMAT, "version": _VERSION, "settings": self._settings})

    @property
    def finished(self) -> int:
        """Number of finished trials."""
        return len(self._finished)

    def recorded(self, key: str, task: Any) -> dict[str, Any] | None:
        """The recorded result of a trial, or None.

        Raises:
            ScheduleError: the record is of another task under this key.
        """
        record = self._finished.get(key)
        if record is None:
            return None
        if record.get("task") != digest(task):
            raise ScheduleError(
                f"{self._path}: the trial {key!r} is another one than this search would make",
                remedy="The log was made with other versions of was-fx or its dependencies. Start a new search.",
            )
        return record

    def add(self, key: str, task: Any, result: Mapping[str, Any]) -> dict[str, Any]:
        """Record a finished trial, and give it back as it will be read.

        Raises:
            ValueError: JSON can't hold it.
            OSError: the file can't be written.
        """
        record = json.loads(json.dumps({"trial": key, "task": digest(task), **result}))
        if self._path is not None:
            self._append(record)
        self._finished[key] = record
        return record

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._path is not None
        append_line(self._path, json.dumps(record, ensure_ascii=False, allow_nan=False))

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = whole_lines(data)
        try:
            records = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError as error:
            message = f"{path} is not a search log, or is damaged ({error})"
            raise ScheduleError(message, remedy=_REMEDY) from error
        if not records and data.startswith(_BEGINNING[: len(data)]):
            os.truncate(path, 0)  # killed while its first line was written
            return
        header = records[0] if records and all(isinstance(record, dict) for record in records) else {}
        if header.get("format") != FORMAT or header.get("version") != _VERSION:
            message = f"{path} is not a search log of this version: its first line is {str(header)[:80]!r}"
            raise ScheduleError(message, remedy=_REMEDY)
        self._compare(path, header.get("settings", {}))
        incomplete = [number for number, record in enumerate(records[1:], 2) if not {"trial", "task"} <= set(record)]
        if incomplete:
            raise ScheduleError(f"{path} is damaged", [f"line {n} is no trial" for n in incomplete], "Search anew.")
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self._finished = {record["trial"]: record for record in records[1:]}

    def _compare(self, path: Path, found: Mapping[str, Any]) -> None:
        problems = [
            f"{key} is {found.get(key)!r} in the log, {self._settings.get(key)!r} in this search"
            for key in sorted({*found, *self._settings})
            if found.get(key) != self._settings.get(key)
        ]
        if problems:
            raise ScheduleError(
                f"{path} is the log of another search", problems, "Repeat its settings, or start a new log."
            )


def digest(task: Any) -> str:
    """A short hash of JSON values; numbers count to six digits."""
    text = json.dumps(_rounded(task), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value

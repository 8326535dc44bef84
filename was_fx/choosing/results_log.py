"""`ResultsLog`: results that a run which was killed need not measure again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from was_fx.schedules.files.json_lines import append_line, whole_lines

FORMAT = "was-fx results"


class ResultsLog:
    """Results by what was measured, a JSON line each.

    A line is written whole and synced before the work goes on; the part of one that a kill may leave at the end is
    dropped. What was measured says all that a result depends on, so results of other settings lie in the same file.

    Args:
        path: the file; it need not exist yet.

    Raises:
        ValueError: the file holds something else.
        OSError: it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = whole_lines(data)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                if record["format"] != FORMAT:
                    raise ValueError(f"its format is {record['format']!r}")
                self._results[_key(record["what"])] = record["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is no result ({error!r}); move the file away, or give another name"
                ) from error
        if whole != data:
            os.truncate(path, len(whole))

    def get(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of this measurement, if it is here."""
        return self._results.get(_key(what))

    def add(self, what: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result, and give it back as it will be read.

        Raises:
            ValueError: JSON can't hold it.
            OSError: the file can't be written.
        """
        line = json.dumps({"format": FORMAT, "what": what, "result": result}, allow_nan=False)
        append_line(self._path, line)
        found: dict[str, Any] = json.loads(line)["result"]
        self._results[_key(what)] = found
        return found


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)

"""Where output goes: results to stdout, progress and errors to stderr."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

Advance = Callable[[int, int], None]


def stdout() -> Console:
    """The console of results. Made when it is needed, so that redirection and the terminal's width count."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """The console of progress and errors."""
    return Console(file=sys.stderr, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, without colour or wrapping. NaN and infinity become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """A progress bar on stderr, gone when it is done; without a terminal, one line that says what is being done.

    Gives a function to be called with (done, total).
    """
    console = stderr()
    if not console.is_terminal:
        console.print(f"{description} …", markup=False, soft_wrap=True)
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[count]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=None, count="")
        yield lambda done, total: bar.update(task, completed=done, total=total, count=f"{done}/{total}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Where output goes: results to stdout, progress and errors to stderr. Names in it are text, never markup."""

import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from was_fx.schedules.names import visible
from was_fx.schedules.progress import Progress


class PlainConsole(Console):
    """Shows strings as they are: no markup, no emoji codes, no links, and control characters visibly.

    What is styled is given a `style` or is a `Text`.
    """

    def __init__(self, file: IO[str], **settings: Any) -> None:
        super().__init__(file=file, highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """What every string that is printed, or stands in a table, goes through."""
        return super().render_str(visible(text, keep="\n\t"), **settings)


def stdout() -> PlainConsole:
    """The console of results. Made when it is needed, so that redirection and the terminal's width count."""
    return PlainConsole(sys.stdout)


def stderr() -> PlainConsole:
    """The console of progress and errors."""
    return PlainConsole(sys.stderr)


def say(text: str, style: str = "") -> None:
    """Print a line of results on stdout, however long."""
    stdout().print(visible(text), style=style, soft_wrap=True)


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """While it lasts, `note` and `progress` show nothing if `quiet`."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether progress is not to be shown."""
    return _quiet.get()


def note(text: str, style: str = "dim") -> None:
    """Print a line on stderr: what is being done, or good to know."""
    if is_quiet():
        return
    stderr().print(visible(text), style=style, soft_wrap=True)


def print_labelled(label: str, style: str, text: str) -> None:
    """Print a line on stderr, whatever is quiet: `Error:` and what is wrong, or the like."""
    stderr().print(Text(label, style=style), text, soft_wrap=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON object on stdout, without colour or wrapping; in one line without an indent. NaN and infinity
    become null."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # JSON itself escapes only some of the control characters.
    sys.stdout.write(re.sub(r"[^\n\x20-\x7e]", _json_escaped, text) + "\n")
    sys.stdout.flush()


def _json_escaped(found: re.Match[str]) -> str:
    return found[0] if visible(found[0]) == found[0] else f"\\u{ord(found[0]):04x}"


_interrupted = threading.Event()


def interrupt(*_: object) -> None:
    """Handler of Ctrl-C. Where the exception is lost, in code that ignores all, `progress` raises it again."""
    _interrupted.set()
    raise KeyboardInterrupt


def _advance(*_: object) -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def progress(description: str) -> Iterator[Progress]:
    """A progress bar on stderr, gone when it is done; without a terminal, one line that says what is being done.

    Gives a function to be called with (done, total).
    """
    console = stderr()
    if is_quiet() or not console.is_terminal:
        note(f"{description} …", style="")
        yield _advance
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    what, count = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[count]"))
    with Bars(what, BarColumn(bar_width=24), count, TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task(visible(description), total=None, count="")

        def advance(done: int, total: int) -> None:
            _advance()
            bars.update(task, completed=done, total=total, count=f"{done}/{total}")

        yield advance


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""The one place where errors become messages and exit codes: 1 failed, 2 usage, 130 interrupted."""

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from was_fx.cli.render.console import print_labelled, stderr
from was_fx.schedules.names import suggestion, visible

INTERRUPTED = 130
_USAGE_ERROR: Any = typer.BadParameter.__base__  # which Typer doesn't name
_OURS = Path(__file__).resolve().parent.parent


class Commands(TyperGroup):
    """The group of all sub-commands, which reports their errors.

    Bad usage is left to Typer, which gets what the user wrote as plain text. With `--debug`, or WAS_DEBUG=1, errors
    keep their traceback.
    """

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the arguments up to the sub-command's name."""
        with _usage_as_text():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Read the sub-command's own arguments, and run it."""
        shown = warnings.showwarning
        _hush_libraries()
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            with _usage_as_text():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            report_interrupt(error)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            known = expected(error)
            if known is None or ctx.params.get("debug"):
                raise
            report(known)
            raise typer.Exit(1) from None
        finally:
            warnings.showwarning = shown


@contextmanager
def _usage_as_text() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, _USAGE_ERROR):
            error.message = visible(_with_suggestion(error))  # type: ignore[attr-defined]
        raise


def _with_suggestion(error: Any) -> str:
    """What is wrong, with the nearest option or choice; Typer itself suggests commands."""
    message = error.message.removeprefix("Value error, ")
    possible = getattr(error, "possibilities", None)
    if possible:
        error.possibilities = []
        return f"{message}{suggestion(error.option_name, possible)}"
    choice = re.fullmatch(r"('.*') is not one of ((?:'[^']*'(?:, )?)+)\.?", message, re.DOTALL)
    if choice:
        choices = re.findall(r"'([^']*)'", choice[2])
        return f"{choice[1]} is not one of {', '.join(choices)}{suggestion(choice[1][1:-1], choices)}"
    return message


def expected(error: BaseException) -> BaseException | None:
    """The error to tell the user about, taken out of torch.compile's wrapper; None if it is a defect of ours."""
    error = getattr(error, "inner_exception", None) or error
    if isinstance(error, BrokenPipeError):
        return None  # `was … | head`: Click ends quietly
    kinds: list[type[BaseException]] = [ValueError, TypeError, OSError]
    for module, name in (("was_fx.passes.graph.errors", "RewriteError"), ("torch", "OutOfMemoryError")):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return error if isinstance(error, tuple(kinds)) else None


def report(error: BaseException) -> None:
    """Print an error on stderr: what is wrong, and what to do about it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    # Remedies name Python's arguments; the command line has its own.
    text = text.replace("`allow_other_model=True`", "--allow-other-model")
    text = re.sub(r"weights=\{(.+?)\}", _weights_options, text)
    # A `ScheduleError` alone has several lines, and sees to it that names add none.
    print_labelled("Error:", "bold red", text if hasattr(error, "problems") else visible(text))


def _weights_options(found: re.Match[str]) -> str:
    """`weights={"lm_head": "int8", "*": "int4"}` as options."""
    pairs = re.findall(r'"(.+?)": "(.+?)"', found[1])
    return " ".join(
        f"--weights {format if pattern == '*' else shlex.quote(f'{pattern}={format}')}" for pattern, format in pairs
    )


def report_interrupt(interrupt: BaseException | None = None) -> None:
    """Say that Ctrl-C was heard, that files are whole, and how to go on: the notes that the interrupt carries."""
    stderr().print()
    notes = " ".join(getattr(interrupt, "__notes__", []))
    print_labelled("Interrupted.", "bold yellow", visible(f"Nothing was left half-written. {notes}".rstrip()))


def _hush_libraries() -> None:
    """Keep away what libraries log while they are imported: binaries of torchao for other versions, and the like."""
    if not os.environ.get("WAS_DEBUG"):
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _show_warning(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
    """Our own warnings in one line; those of libraries only with WAS_DEBUG."""
    if Path(filename).resolve().is_relative_to(_OURS) or os.environ.get("WAS_DEBUG"):
        print_labelled("Warning:", "bold yellow", str(message))

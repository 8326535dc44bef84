"""Errors become one message and an exit code."""

import pytest
import typer
from typer.testing import CliRunner

from was_fx import RewriteError, ScheduleError
from was_fx.cli.errors import Commands, expected


def _run(error: BaseException, *arguments: str):
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.callback()
    def start(debug: bool = False) -> None:
        """A group, so that there are sub-commands."""

    @app.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(app, [*arguments, "fail"])


class _WrapperError(RuntimeError):
    """As torch.compile wraps what a backend raises."""

    inner_exception = RewriteError("a Linear could not be rewritten")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ScheduleError("it does not fit", ["one [bold]thing[/]", "another"], "Make a new one."), "one [bold]thing[/]"),
        (TypeError("tokens is float32"), "tokens is float32"),
        (FileNotFoundError(2, "No such file", "here.txt"), "here.txt: No such file"),
        (RewriteError("a Linear could not be rewritten"), "could not be rewritten"),
        (_WrapperError("backend='was' raised"), "Error: a Linear could not be rewritten"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_expected_error_is_one_message_without_traceback(error, message):
    result = _run(error)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.stderr


def test_debug_keeps_the_traceback():
    assert isinstance(_run(ValueError("x"), "--debug").exception, ValueError)


def test_a_defect_of_ours_is_not_hidden():
    assert isinstance(_run(AssertionError("x")).exception, AssertionError)


def test_an_interrupt_has_its_own_code():
    result = _run(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr


def test_a_closed_pipe_is_left_to_click():
    assert expected(BrokenPipeError()) is None

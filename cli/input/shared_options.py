"""Options that Typer's functions need not name: every command has `--quiet`, and every one that loads a model has those
that say how it is loaded."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from was_fx.cli.render.console import quietly


@dataclass(frozen=True)
class Loading:
    """How models and their tokenizers are loaded; the arguments of `from_pretrained` of these names.

    Attributes:
        revision: branch, tag or commit of a model on the Hub.
        trust_remote_code: run the code that the model's repository brings.
        device_map: how the model is spread over devices; None for one device.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that were given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if value}


QUIET = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr; warnings and errors stay.")
]
LOADING = {
    "revision": Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the Hub.")
    ],
    "trust_remote_code": Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that the model's repository brings, if it does."),
    ],
    "device_map": Annotated[
        str | None,
        typer.Option(
            metavar="auto|balanced|…",
            help="Spread the model over devices, or offload what doesn't fit, as accelerate does; instead of --device.",
        ),
    ],
}
PLAIN = Loading()
_loading: ContextVar[Loading | None] = ContextVar("loading", default=None)


def loading() -> Loading:
    """What the running command was given."""
    return _loading.get() or PLAIN


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the options of this file at the end of its own; those that it names itself stay its own."""
    own = inspect.signature(command)
    shared: dict[str, Any] = dict(LOADING) if "device" in own.parameters or "model" in own.parameters else {}
    if "device" not in own.parameters:  # of such a model only the configuration is read
        shared.pop("device_map", None)
    shared["quiet"] = QUIET
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(PLAIN, name, False),
            annotation=annotation,
        )
        for name, annotation in shared.items()
        if name not in own.parameters
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        names = {each.name for each in added}
        ours = {name: given.pop(name) for name in names}
        quiet = ours.pop("quiet", False)
        if ours.get("device_map") and given.get("device") not in (None, "auto"):
            raise typer.BadParameter("give either --device or --device-map", param_hint="'--device-map'")
        with quietly(quiet), _loaded_so(Loading(**ours)):
            try:
                command(**given)
            except KeyboardInterrupt as error:
                error.add_note(how_to_go_on(given))
                raise

    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **{each.name: each.annotation for each in added}}
    return run


def how_to_go_on(given: Mapping[str, Any]) -> str:
    """What to do after Ctrl-C, by the options of the command."""
    option = next((name for name in ("log", "record") if name in given), None)
    if option is None:
        return "Start again when you like."
    if given[option] is None:
        return f"With --{option} FILE it could go on where it stopped."
    resume = ", with --resume" if given.get("resume") is False else ""
    return f"The same command{resume} goes on: what was done is in {given[option]}."


@contextmanager
def _loaded_so(how: Loading) -> Iterator[None]:
    token = _loading.set(how)
    try:
        yield
    finally:
        _loading.reset(token)

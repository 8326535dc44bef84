"""The command `was`."""

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from was_fx.cli.commands import (
    bench,
    calibrate,
    chat,
    check,
    compare,
    coverage,
    demo,
    diff,
    doctor,
    evaluate,
    generate,
    import_artifacts,
    inspect_file,
    make,
    ppl,
    published,
    quantize,
    recalibrate,
    recommend,
    report,
    reproduce,
    search,
    serve,
    tune,
)
from was_fx.cli.errors import INTERRUPTED, Commands, report_interrupt
from was_fx.cli.input.options import examples
from was_fx.cli.input.shared_options import with_shared_options
from was_fx.cli.render.console import interrupt
from was_fx.version import __version__

HELP = """Decode faster by not reading the weight columns whose input is negligible.

A [bold]calibration[/] is what the activations of a model look like on a text. A [bold]schedule[/] says below
which threshold each Linear skips an input channel. It lies beside the checkpoint, which stays as it is.
"""

EXITS = """

[bold]Exit codes[/]

0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, progress and errors to stderr.

Shell completion: was --install-completion. Documentation: docs/quickstart.md."""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _joined(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"was-fx {__version__}")
        raise typer.Exit


@app.callback(
    help=_joined(HELP),
    epilog=examples(
        "was demo  [dim]everything at once, on a tiny model, offline[/]",
        "was calibrate MODEL --text book.txt  [dim]measure a model on a text, once[/]",
        "was make calibration.safetensors --target 50%  [dim]make a schedule of it[/]",
        "was search MODEL --target 50% --text valid.txt  [dim]or find a better one[/]",
        "was recommend MODEL --text book.txt --loss 1%  [dim]or ask how much it takes[/]",
        "was ppl MODEL --schedule FILE --text other.txt  [dim]see what it costs[/]",
        "was generate MODEL --schedule FILE --prompt Hello  [dim]decode with it[/]",
    )
    + EXITS,
)
def was(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="WAS_DEBUG", hidden=True, help="Show the tracebacks of errors.")
    ] = False,
) -> None:
    """What every sub-command starts with."""


def _add(name: str, command: Callable[..., None], epilog: str, group: typer.Typer = app) -> None:
    """Register a sub-command; the lines of a paragraph of its docstring are joined, for Typer keeps line breaks."""
    group.command(name, epilog=epilog, help=_joined(command.__doc__ or ""))(with_shared_options(command))


_add("demo", demo.demo, demo.EXAMPLES)
_add("doctor", doctor.doctor, doctor.EXAMPLES)
_add("calibrate", calibrate.calibrate, calibrate.EXAMPLES)
_add("make", make.make, make.EXAMPLES)
_add("search", search.search, search.EXAMPLES)
_add("recommend", recommend.recommend, recommend.EXAMPLES)
_add("quantize", quantize.quantize, quantize.EXAMPLES)
_add("recalibrate", recalibrate.recalibrate, recalibrate.EXAMPLES)
_add("inspect", inspect_file.inspect_file, inspect_file.EXAMPLES)
_add("compare", compare.compare, compare.EXAMPLES)
_add("diff", diff.diff, diff.EXAMPLES)
_add("import", import_artifacts.import_artifacts, import_artifacts.EXAMPLES)
_add("ppl", ppl.ppl, ppl.EXAMPLES)
_add("eval", evaluate.evaluate, evaluate.EXAMPLES)
_add("reproduce", reproduce.reproduce, reproduce.EXAMPLES)
_add("report", report.report, report.EXAMPLES)
_add("coverage", coverage.coverage, coverage.EXAMPLES)
_add("generate", generate.generate, generate.EXAMPLES)
_add("chat", chat.chat, chat.EXAMPLES)
_add("serve", serve.serve, serve.EXAMPLES)
_add("check", check.check, check.EXAMPLES)
_add("bench", bench.bench, bench.EXAMPLES)
_add("tune", tune.tune, tune.EXAMPLES)

releases = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help=published.HELP)
app.add_typer(releases, name="published")
_add("list", published.list_published, published.LIST_EXAMPLES, group=releases)
_add("show", published.show_published, published.SHOW_EXAMPLES, group=releases)
_add("export", published.export_published, published.EXPORT_EXAMPLES, group=releases)


def main() -> None:
    """Run the command line; what `was` starts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that can't show ‖W‖
    signal.signal(signal.SIGINT, interrupt)
    try:
        app(prog_name="was")
    except KeyboardInterrupt:
        report_interrupt()
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

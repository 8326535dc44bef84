"""The command `was`."""

import contextlib
import sys
from typing import Annotated

import typer

from was_fx.cli import calibrate, demo, generate, inspect_file, make, ppl
from was_fx.cli.errors import INTERRUPTED, Commands, report_interrupt
from was_fx.cli.options import examples

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from was_fx import __version__

        typer.echo(f"was-fx {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "was demo  [dim]everything at once, on a tiny model, offline[/]",
        "was calibrate MODEL --text book.txt  [dim]measure a model on a text, once[/]",
        "was make calibration.safetensors --target 50%  [dim]make a schedule of it[/]",
        "was ppl MODEL --schedule schedule.was.safetensors --text other.txt  [dim]what it costs[/]",
        "was generate MODEL --schedule schedule.was.safetensors --prompt Hello  [dim]decode with it[/]",
    )
)
def was(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="WAS_DEBUG", hidden=True, help="Show the tracebacks of errors.")
    ] = False,
) -> None:
    """Decode faster by not reading the weight columns whose input is negligible.

    A [bold]calibration[/] is what the activations of a model look like on a text. A [bold]schedule[/] says below
    which threshold each Linear skips an input channel. It lies beside the checkpoint, which stays as it is.
    """


app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.command("calibrate", epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command("make", epilog=make.EXAMPLES)(make.make)
app.command("sparsify", epilog=make.EXAMPLES, help="The same as [bold]was make[/].")(make.make)
app.command("inspect", epilog=inspect_file.EXAMPLES)(inspect_file.inspect_file)
app.command("ppl", epilog=ppl.EXAMPLES)(ppl.ppl)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)


def main() -> None:
    """Run the command line; what `was` starts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that can't show ‖W‖
    try:
        app()
    except KeyboardInterrupt:
        report_interrupt()
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""The hook of mkdocs.yml: makes the pages that come from the code, and reads the others as GitHub does.

`reference/commands.md` comes from the command line itself, `reference/python.md` from `was_fx.__all__`, for
mkdocstrings to fill with docstrings. Neither imports torch.
"""

import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
# Where mkdocstrings reads; and the folders that install inside the package and lie beside it in a checkout.
LAYOUT = ROOT / "build" / "docs-package"
PARTS = ("cli", "kernels", "passes", "schedules")
# Sections of the page on Python; public names that none lists come last.
SECTIONS = {
    "Make a schedule": ("calibrate", "uniform", "fisher", "search", "recalibrate", "load_published", "import_release"),
    "Run with it": ("sparsify", "densify", "check", "quantize", "draft", "decode"),
    "Measure": ("evaluate", "perplexity", "Evaluation"),
    "What they are": ("Schedule", "LinearSchedule", "Calibration", "Score", "WasConfig"),
    "Errors": ("ScheduleError", "RewriteError"),
}
_LIST = re.compile(r"^([-*+]|\d+[.)])\s")


def on_startup(command: str, dirty: bool) -> None:
    """Lay the package out as it installs, where mkdocs.yml lets mkdocstrings look for it."""
    shutil.rmtree(LAYOUT, ignore_errors=True)
    for source, name in {"was_fx": "", **{part: part for part in PARTS}}.items():
        shutil.copytree(ROOT / source, LAYOUT / "was_fx" / name, ignore=_all_but_code, dirs_exist_ok=True)
    for folder in LAYOUT.rglob("*/"):
        (folder / "__init__.py").touch()  # a plain folder inside a package is passed over


def _all_but_code(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".py") and not (Path(folder) / name).is_dir()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from the code."""
    for path, content in {"reference/commands.md": commands_page(), "reference/python.md": python_page()}.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Start a list after a line of text, as GitHub does; Python-Markdown wants a blank line between."""
    return blank_before_lists(markdown)


def blank_before_lists(markdown: str) -> str:
    """The text with a blank line before each list that follows a paragraph directly."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if not fenced and _LIST.match(line) and before and not _LIST.match(before) and not before.startswith(" "):
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """A page with a section for each public name of was_fx."""
    import was_fx

    grouped = {name for names in SECTIONS.values() for name in names}
    rest = tuple(name for name in was_fx.__all__ if name not in grouped and not name.startswith("__"))
    lines = ["# Python", "", "Everything here is `was_fx.…`; what is not here may change without notice.", ""]
    for section, names in {**SECTIONS, "More": rest}.items():
        if names:
            lines += [f"## {section}", "", *(f"::: was_fx.{name}\n" for name in names)]
    return "\n".join(lines)


def commands_page() -> str:
    """A page with a section for each command: what it does, its arguments, options and examples."""
    from was_fx.cli.main import app

    root = typer.main.get_command(app)
    return "\n".join(["# Commands", "", *_command(root, "was", heading=""), *_commands(root, "was")])


def _commands(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if not command.hidden:
            full = f"{path} {name}"
            yield from _command(command, full, heading=f"## {full}")
            if hasattr(command, "commands"):
                yield from _commands(command, full)


def _command(command: Any, path: str, heading: str) -> Iterator[str]:
    context = typer.Context(command, info_name=path)
    yield from (heading, "", _plain(command.help or ""), "")
    for kind in ("argument", "option"):
        records = [each.get_help_record(context) for each in command.params if each.param_type_name == kind]
        rows = [f"| {_code(names)} | {_text(text)} |" for names, text in filter(None, records)]
        if rows:
            yield from (f"| {kind} | |", "|---|---|", *rows, "")
    if command.epilog:
        examples = [_plain(line) for line in command.epilog.split("\n\n")]
        yield from ("```sh", *(_example(line) for line in examples if line.startswith("was ")), "```", "")


def _code(names: str) -> str:
    """`--out FILE`, each name by itself, so that a table can break the line between them."""
    return " ".join(f"<code>{_text(name)}</code>" for name in names.split(" ", 1))


def _text(text: str) -> str:
    """As it is in a cell of a table: what looks like HTML or Markdown is text."""
    return re.sub(r"([|*_`\[\]\\])", lambda found: f"&#{ord(found[1])};", html.escape(_plain(text), quote=False))


def _plain(text: str) -> str:
    """Without rich's markup; what Typer adds, such as [required], is none."""
    return Text.from_markup(re.sub(r"\[(?=default|required|x[<>]|\d+<|env )", r"\\[", text)).plain


def _example(line: str) -> str:
    """A line of a command's examples, with what it does as a comment."""
    command, _, comment = line.partition("  ")
    return f"{command}  # {comment}" if comment else command

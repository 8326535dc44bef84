"""Data sets that models are evaluated on, as the texts that published perplexities are of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from was_fx.cli.input.texts import Text, open_text, read_file
from was_fx.cli.render.console import stderr
from was_fx.schedules.names import suggestion

_ROWS_OF = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".xz", ".zst", ".bz2")


@dataclass(frozen=True)
class Named:
    """A data set by the name that papers give it.

    Attributes:
        hub: its name on the Hub.
        arguments: what `datasets.load_dataset` is given besides.
        split: the part that is evaluated on.
        separator: what stands between two of its texts.
        rows: only the first so many texts; None: all.
        tokens: only the first so many tokens of them together; None: all.
        keeps_line_ends: its texts are the lines of a file with what ends them, blank lines without.
    """

    hub: str
    arguments: dict[str, Any]
    split: str
    separator: str
    rows: int | None = None
    tokens: int | None = None
    keeps_line_ends: bool = False


# As GPTQ's evaluation reads them, and after it those of SparseGPT, Wanda, WAS and most others.
NAMED = {
    "wikitext2": Named("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "test", "\n\n", keeps_line_ends=True),
    "c4": Named(
        "allenai/c4",
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
        "validation",
        " ",
        rows=1100,
        tokens=256 * 2048,
    ),
}


def read_dataset(given: str) -> Text:
    """What `--dataset` stands for: `wikitext2` or `c4` from the Hub, `wikitext2=PATH` the same from a local copy, or a
    text file as it is.

    Raises:
        typer.BadParameter: there is neither such a data set nor such a file.
        ValueError: it can't be had, or is no such data set.
        OSError: a file can't be read.
    """
    name, equals, local = given.partition("=")
    if name in NAMED:
        rows = _rows_on_disk(NAMED[name], Path(local)) if equals else _rows_of_the_hub(name, NAMED[name])
        return _joined(given, NAMED[name], rows)
    if Path(given).is_file():
        return read_file(given)
    known = ", ".join(NAMED)
    raise typer.BadParameter(
        f"there is no data set and no file {given!r}{suggestion(name, list(NAMED))}; expected one of {known}, "
        f"{next(iter(NAMED))}=PATH for a local copy, or a UTF-8 text file",
        param_hint="'--dataset'",
    )


def _joined(name: str, dataset: Named, rows: Iterable[str]) -> Text:
    def parts() -> Iterator[str]:
        for index, row in enumerate(rows):
            if index == dataset.rows:
                return
            yield dataset.separator + row if index else row

    return Text(name, parts, dataset.tokens)


class _Column:
    """The texts of a loaded data set, one at a time."""

    def __init__(self, rows: Any, name: str) -> None:
        if "text" not in (rows.column_names or ()):
            raise ValueError(f"{name} has the columns {', '.join(rows.column_names or ())}; expected 'text' among them")
        self._rows = rows

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self._rows)


class _Lines:
    """The lines of a text file, as the builder of WikiText makes texts of them."""

    def __init__(self, path: Path, keeps_line_ends: bool) -> None:
        self._path, self._keeps = path, keeps_line_ends
        open_text(path).close()

    def __iter__(self) -> Iterator[str]:
        with open_text(self._path) as file:
            for line in file:
                yield (line if line.strip() else "") if self._keeps else line.rstrip("\n")


def _rows_of_the_hub(name: str, dataset: Named) -> Iterable[str]:
    library = _library()
    try:
        rows = library.load_dataset(dataset.hub, **dataset.arguments, split=dataset.split)
    except (OSError, ValueError, RuntimeError) as error:  # among them all of huggingface_hub's own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the data set {dataset.hub} could not be had from the Hub ({reason[:200]}). Offline, give a copy: "
            f"--dataset {name}=PATH, of a folder (a clone of its repository, or what save_to_disk wrote), a parquet or "
            "JSON-lines file, or a text file with a text on each line"
        ) from error
    return _Column(rows, dataset.hub)


def _rows_on_disk(dataset: Named, path: Path) -> Iterable[str]:
    """Texts of a local copy.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it can't be read as one.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such copy of the data set", str(path))
    form = _form(path)
    if path.is_file() and form is None:
        return _Lines(path, dataset.keeps_line_ends)
    library = _library()
    try:
        if form is not None:
            rows = library.load_dataset(form, data_files=str(path), split="train")
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = library.load_from_disk(str(path))
            rows = rows[dataset.split] if (path / "dataset_dict.json").exists() else rows
        else:
            rows = library.load_dataset(str(path), **dataset.arguments, split=dataset.split)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no copy of {dataset.hub} with the split {dataset.split!r} ({reason})") from error
    return _Column(rows, str(path))


def _form(path: Path) -> str | None:
    """Which of the library's readers a file is for; None: a text file, or a folder."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _ROWS_OF.get(suffixes[-1]) if suffixes and path.is_file() else None


def _library() -> Any:
    """Hugging Face's datasets, quiet.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'data sets need a library: pip install "was-fx[eval]" ({error})') from error
    if not stderr().is_terminal:
        datasets.disable_progress_bars()
    return datasets

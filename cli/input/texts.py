"""Texts, and the windows of tokens that a model reads them in."""

import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from was_fx.cli.input.models import Loaded
from was_fx.cli.input.options import EMBEDDED
from was_fx.cli.render.console import progress
from was_fx.schedules.names import suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from was_fx.measure.conventions import Convention

_DEFAULT_LENGTH = 512
_PART = 2**20  # characters read from a file at a time
_OPEN: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]


@dataclass(frozen=True)
class Text:
    """A text, and what it is called.

    Attributes:
        name: what the user called it.
        parts: gives it anew, in parts that were cut anywhere.
        tokens: at most so many of its tokens count, where its users agree on that.
    """

    name: str
    parts: Callable[[], Iterable[str]]
    tokens: int | None = None

    @property
    def content(self) -> str:
        """The whole."""
        return "".join(self.parts())


def read_text(name: str | None, model: str, split: str) -> Text:
    """What `--text` stands for: a file, `embedded:<split>`, or without it the embedded model's own text.

    Raises:
        typer.BadParameter: another model needs a text.
        ValueError: an unknown split, or the file is not UTF-8.
        OSError: it can't be read.
    """
    own = f"{EMBEDDED}:{split}"
    if name is None and model != EMBEDDED:
        raise typer.BadParameter(
            f"the model {model!r}{suggestion(model, [EMBEDDED])} needs a text: a UTF-8 file, or {own} for one inside "
            "was-fx",
            param_hint="'--text'",
        )
    name = own if name is None else name
    if name.startswith(f"{EMBEDDED}:"):
        from was_fx import embedded

        content = embedded.text(name.removeprefix(f"{EMBEDDED}:"))  # type: ignore[arg-type]
        return Text(name, lambda: [content])
    return read_file(name)


def read_file(name: str) -> Text:
    """A text file as it is.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it can't be read.
    """
    path = Path(name)
    next(_read_parts(path), "")  # say at once what can't be read
    return Text(name, lambda: _read_parts(path))


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text file, which may be compressed by gzip or xz, to be read.

    Raises:
        OSError: it can't be read.
    """
    return _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8")


def _read_parts(path: Path) -> Iterator[str]:
    try:
        with open_text(path) as file:
            while part := file.read(_PART):
                yield part
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged compressed file ({error}); fetch it again") from error


def windows(
    loaded: Loaded, text: Text, *, length: int | None, limit: int | None = None, tokens: int | None = None
) -> "Tensor":
    """The text as ids [n, length]: consecutive windows without overlap, each opened as the tokenizer opens a text.

    Args:
        loaded: whose tokenizer is used, and whose positions bound the length.
        text: the text.
        length: tokens per window; None takes 512, or the model's positions if they are fewer.
        limit: at most so many windows.
        tokens: at most so many tokens, in whole windows.

    Raises:
        ValueError: the text doesn't fill one window, or the model takes no window so long.
    """
    most = loaded.positions
    if length is not None and most is not None and length > most:
        raise ValueError(f"--length is {length}, but {loaded.name} takes at most {most} tokens")
    length = length or min(_DEFAULT_LENGTH, most or _DEFAULT_LENGTH)
    if tokens is not None and tokens < length:
        raise ValueError(f"--tokens is {tokens}, less than one window of {length}; give a smaller --length")
    wanted = [n for n in (limit, None if tokens is None else tokens // length) if n is not None]
    opening = opening_ids(loaded.tokenizer)
    own = length - len(opening)
    if own < 1:
        raise ValueError(f"--length is {length}, but each window begins with {len(opening)} of the tokenizer's tokens")
    ids = tokens_of(loaded, text, min(wanted) * own + len(opening) if wanted else None)
    found = cut_windows(ids[len(opening) :], length, opening)
    if not len(found):
        raise _too_short(text, ids, "window", length)
    return found


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer of transformers puts before a text: `[bos]`, or nothing.

    Some models, Gemma among them, predict hardly anything without it.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def cut_windows(ids: "Tensor", length: int, opening: list[int]) -> "Tensor":
    """Ids [n, length] int64: the opening ids and then those of a text [m], in consecutive windows without overlap."""
    import torch

    own = length - len(opening)
    cut = ids[: len(ids) // own * own].long().reshape(-1, own)
    return torch.cat([torch.tensor(opening, dtype=torch.int64).expand(len(cut), -1), cut], 1)


def spread_windows(loaded: Loaded, text: Text, *, length: int | None, tokens: int) -> "Tensor":
    """As `windows`, about so many tokens in windows that are spread over the whole text."""
    import torch

    every = windows(loaded, text, length=length)
    if tokens < every.shape[1]:
        raise ValueError(f"--tokens is {tokens}, too few for windows of {every.shape[1]}; give a smaller --length")
    count = min(len(every), tokens // every.shape[1])
    return every[torch.arange(count) * len(every) // count]


def sequences(loaded: Loaded, text: Text, convention: "Convention", *, limit: int | None = None) -> "Tensor":
    """The text as ids int32 [n, length] by a convention for evaluating; a view of a file.

    Args:
        loaded: whose tokenizer is used.
        text: the text.
        convention: how it is cut; fitted to the model.
        limit: at most so many sequences.

    Raises:
        ValueError: the text doesn't fill one.
    """
    ids = tokens_of(loaded, text, None if limit is None else convention.tokens(limit))
    if len(ids) < convention.length:
        raise _too_short(text, ids, "sequence", convention.length)
    return convention.sequences(ids)


def tokens_of(loaded: Loaded, text: Text, most: int | None = None) -> "Tensor":
    """Ids of a text, int32 [n], at most so many; they lie in a file, so the text may be larger than memory."""
    from was_fx.cli.input.token_stream import in_a_file, token_ids

    wanted = min((n for n in (most, text.tokens) if n is not None), default=None)
    with progress(f"Reading {text.name}"):
        return in_a_file(token_ids(loaded.tokenizer, text.parts()), wanted)


def _too_short(text: Text, ids: "Tensor", what: str, length: int) -> ValueError:
    return ValueError(
        f"{text.name} has {len(ids)} tokens, too few for one {what} of {length}; "
        "give a longer text, or a smaller --length"
    )

"""Texts, and the windows of tokens that a model reads them in."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from was_fx.cli.input.models import Loaded
from was_fx.cli.input.options import EMBEDDED
from was_fx.schedules.names import suggestion

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Text:
    """A text, and what it is called."""

    name: str
    content: str


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

        return Text(name, embedded.text(name.removeprefix(f"{EMBEDDED}:")))  # type: ignore[arg-type]
    try:
        return Text(name, Path(name).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error


def windows(
    loaded: Loaded, text: Text, *, length: int | None, limit: int | None = None, tokens: int | None = None
) -> "Tensor":
    """The text as ids [n, length]: consecutive windows without overlap.

    Args:
        loaded: whose tokenizer is used, and whose positions bound the length.
        text: the text.
        length: tokens per window; None takes 512, or the model's positions if they are fewer.
        limit: at most so many windows.
        tokens: at most so many tokens, in whole windows.

    Raises:
        ValueError: the text doesn't fill one window, or the model takes no window so long.
    """
    import torch

    most = loaded.positions
    if length is not None and most is not None and length > most:
        raise ValueError(f"--length is {length}, but {loaded.name} takes at most {most} tokens")
    length = length or min(_DEFAULT_LENGTH, most or _DEFAULT_LENGTH)
    ids = loaded.tokenizer(text.content)["input_ids"]
    count = len(ids) // length
    if count < 1:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens, too few for one window of {length}; "
            "give a longer text, or a smaller --length"
        )
    if tokens is not None:
        if tokens < length:
            raise ValueError(f"--tokens is {tokens}, less than one window of {length}; give a smaller --length")
        count = min(count, tokens // length)
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)


def spread_windows(loaded: Loaded, text: Text, *, length: int | None, tokens: int) -> "Tensor":
    """As `windows`, about so many tokens in windows that are spread over the whole text."""
    import torch

    every = windows(loaded, text, length=length)
    if tokens < every.shape[1]:
        raise ValueError(f"--tokens is {tokens}, too few for windows of {every.shape[1]}; give a smaller --length")
    count = min(len(every), tokens // every.shape[1])
    return every[torch.arange(count) * len(every) // count]

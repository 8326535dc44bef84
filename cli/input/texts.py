"""Texts, and the windows of tokens that a model reads them in."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from was_fx.cli.input.models import Loaded
from was_fx.cli.input.options import EMBEDDED

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_LENGTH = 512


def text_name(text: str | None, model: str, split: str) -> str:
    """What `--text` stands for: itself, or for the embedded model its own text.

    Raises:
        typer.BadParameter: another model needs a text.
    """
    if text is not None:
        return text
    if model == EMBEDDED:
        return f"{EMBEDDED}:{split}"
    raise typer.BadParameter(
        f"the model {model!r} needs a text: a UTF-8 file, or {EMBEDDED}:{split} for one inside was-fx",
        param_hint="'--text'",
    )


def read_text(name: str) -> str:
    """The text of a file or of an embedded split.

    Raises:
        ValueError: an unknown split, or the file is not UTF-8.
        OSError: it can't be read.
    """
    if name.startswith(f"{EMBEDDED}:"):
        from was_fx import embedded

        return embedded.text(name.removeprefix(f"{EMBEDDED}:"))  # type: ignore[arg-type]
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error


def windows(
    loaded: Loaded,
    text: str,
    name: str,
    *,
    length: int | None = None,
    limit: int | None = None,
    tokens: int | None = None,
) -> "Tensor":
    """The text as ids [n, length]: consecutive windows without overlap.

    Args:
        loaded: whose tokenizer is used, and whose positions bound the length.
        text: the text.
        name: what to call it in an error.
        length: tokens per window; by default 512, or the model's positions if they are fewer.
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
    ids = loaded.tokenizer(text)["input_ids"]
    count = len(ids) // length
    if count < 1:
        raise ValueError(
            f"{name} has {len(ids)} tokens, too few for one window of {length}; "
            "give a longer text, or a smaller --length"
        )
    if tokens is not None:
        if tokens < length:
            raise ValueError(f"--tokens is {tokens}, less than one window of {length}; give a smaller --length")
        count = min(count, tokens // length)
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)

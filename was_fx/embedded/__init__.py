"""The embedded model: a Llama of 5.8 M parameters with its tokenizer and sample texts.

It lets the demo and the tests run without a network. `README.md` in this folder says what the model is, how
it was made and what it is not for.

    from was_fx import embedded

    model, tokenizer = embedded.load()
    ids = embedded.tokens("calibration", length=512, limit=16)  # [16, 512]
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SPLITS", "Split", "load", "path", "text", "tokens"]

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


def path() -> Path:
    """The folder of the model and tokenizer files, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parent


def text(split: Split) -> str:
    """About 200 kB of English prose: paragraphs separated by one blank line, excerpts of books by two.

    `calibration` was part of the training text, `validation` of the text that chose the checkpoint, `test` of
    neither.
    """
    _check_split(split)
    return (path() / f"{split}.txt").read_bytes().decode("utf-8")


def load(dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU and in eval mode, and its tokenizer.

    Without `dtype` the weights are as stored, bfloat16; otherwise `dtype` goes to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = "auto" if dtype is None else dtype
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path(), local_files_only=True)


def tokens(split: Split, length: int = 512, limit: int | None = None) -> torch.Tensor:
    """A text as consecutive, non-overlapping windows: int64 ids [n, length], at most `limit` rows.

    No BOS is added; the last tokens, which fill no window, are left out. A text has about 55,000 tokens.
    """
    _check_split(split)
    ids = _ids(split)
    if not 2 <= length <= len(ids):
        raise ValueError(
            f"length is {length}, expected 2 to {len(ids)}, the number of tokens in the {split} text; "
            "pass for example 512 (the model was trained on windows of 1024)"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1; pass None for all windows")
    import torch

    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}; pass one of these names")


@lru_cache(maxsize=len(SPLITS))
def _ids(split: Split) -> tuple[int, ...]:
    """The token ids of a whole text: those of load()'s tokenizer, without its warning about the length."""
    from tokenizers import Tokenizer

    return tuple(Tokenizer.from_file(str(path() / "tokenizer.json")).encode(text(split)).ids)

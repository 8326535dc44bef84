"""Token ids as callers have them: one tensor, sequences of unequal length, or a tokenizer's output."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.modules.linears import embedding
from was_fx.modules.quantized_embedding import QuantizedEmbedding

Tokens = Tensor | Sequence[Tensor | Sequence[int]] | Mapping[str, Any]


def batches(model: nn.Module, tokens: Tokens, batch_size: int) -> Iterator[tuple[Tensor, int, int]]:
    """(batch [B, S], sequences done with it, all sequences), each batch without padding.

    Args:
        model: whose vocabulary the ids must be of.
        tokens: a LongTensor [n, seq]; or n sequences of ids, of any lengths; or a mapping with `input_ids` and perhaps
            `attention_mask`, as tokenizers return.
        batch_size: sequences per batch; those of unequal length come one by one.

    Raises:
        TypeError: not integers.
        ValueError: wrong rank, empty, or an id outside the vocabulary.
    """
    rows = _without_padding(tokens)
    if isinstance(rows, Tensor):
        check_tokens(model, rows)
        parts = rows.split(batch_size)
    else:
        parts = tuple(row[None] for row in rows)
        if not parts:
            raise ValueError("tokens holds no sequence")
        for part in parts:
            check_tokens(model, part)
    done, total = 0, sum(len(part) for part in parts)
    for part in parts:
        done += len(part)
        yield part, done, total


def number_of_sequences(tokens: Tokens) -> int:
    """How many sequences there are."""
    return len(tokens.get("input_ids", ()) if isinstance(tokens, Mapping) else tokens)


def _without_padding(tokens: Tokens) -> Tensor | list[Tensor]:
    if isinstance(tokens, Tensor):
        return tokens
    if isinstance(tokens, Mapping):
        if tokens.get("input_ids") is None:
            raise ValueError(f"tokens has {', '.join(map(repr, tokens))}; expected 'input_ids'")
        ids, mask = tokens["input_ids"], tokens.get("attention_mask")
        if mask is None:
            return ids if isinstance(ids, Tensor) else [torch.as_tensor(row) for row in ids]
        rows = zip(ids, mask, strict=True)
        return [torch.as_tensor(row)[torch.as_tensor(kept).bool()] for row, kept in rows]
    return [torch.as_tensor(row) for row in tokens]


def vocabulary(model: nn.Module) -> int | None:
    """Number of token ids the model's input embedding knows, or None when it can't be told."""
    module = embedding(model, "get_input_embeddings")
    if isinstance(module, QuantizedEmbedding):
        return module.was_rows.shape[0]
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else None


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Check that `tokens` is a LongTensor [n, seq] within the model's vocabulary.

    Raises:
        TypeError: not an integer tensor.
        ValueError: wrong rank, empty, or an id outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens is {kind}; expected a LongTensor [n, seq] of token ids")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected [n ≥ 1, seq ≥ 2]")
    size = vocabulary(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"tokens holds ids {low} to {high}, but the model's vocabulary is 0 to {(size or 0) - 1}; "
            "tokenise the text with this model's own tokenizer"
        )

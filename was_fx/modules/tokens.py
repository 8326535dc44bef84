"""Token ids as callers have them: one tensor, sequences of unequal length, a tokenizer's output, or a processor's,
which has images or audio beside the ids."""

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.modules.linears import embedding
from was_fx.modules.placement import input_device
from was_fx.modules.quantized_embedding import QuantizedEmbedding

Tokens = Tensor | Mapping[str, Any] | Sequence[Tensor | Sequence[int] | Mapping[str, Any]]
Batch = dict[str, Any]

_SPECIAL = ("token_id", "token_index")  # how names of a configuration end that stand for tokens


def batches(model: nn.Module, tokens: Tokens, batch_size: int) -> Iterator[tuple[Batch, int, int]]:
    """(arguments of the model, sequences done with them, all sequences), each batch without padding.

    Args:
        model: whose vocabulary the ids must be of.
        tokens: a LongTensor [n, seq]; or n sequences of ids, of any lengths; or a mapping with `input_ids` and perhaps
            `attention_mask`, as tokenizers return. A mapping with images or audio beside the ids, as processors return,
            is one batch and counts as one sequence, and so does each mapping among several; `tokens[i]` is then asked
            for when its turn comes, unless they are a list.
        batch_size: sequences per batch; those of unequal length come one by one.

    Raises:
        TypeError: not integers.
        ValueError: wrong rank, empty, an id outside the vocabulary, padding beside images, or images that the model
            doesn't take.
    """
    rows = _rows(tokens)
    if isinstance(rows, Tensor):
        check_tokens(model, rows)
        done = 0
        for part in rows.split(batch_size):
            done += len(part)
            yield {"input_ids": part}, done, len(rows)
        return
    if not len(rows):
        raise ValueError("tokens holds no sequence")
    if isinstance(rows, list):
        for row in rows:
            _batch_of_one(model, row)
    for done, row in enumerate(rows, start=1):
        yield _batch_of_one(model, row), done, len(rows)


def placed(model: nn.Module, batch: Batch) -> Batch:
    """A batch where the model is, with what is floating in it, such as pixels, in the model's dtype."""
    device, dtype = input_device(model), getattr(model, "dtype", None)

    def place(each: Any) -> Any:
        if isinstance(each, (list, tuple)):
            return [place(part) for part in each]
        if not isinstance(each, Tensor):
            return each
        return each.to(device, dtype if each.is_floating_point() else None)

    return {name: place(each) for name, each in batch.items()}


def number_of_sequences(tokens: Tokens) -> int:
    """How many sequences there are."""
    if isinstance(tokens, Mapping):
        return 1 if holds_more_than_text(tokens) else len(tokens.get("input_ids", ()))
    return len(tokens)


def holds_more_than_text(tokens: Mapping[str, Any]) -> bool:
    """Whether what a processor returned has images or audio beside the ids."""
    return bool(_more_than_text(tokens))


def _more_than_text(tokens: Mapping[str, Any]) -> list[str]:
    """The names of what is not in whole numbers: pixels, features of audio."""
    return [name for name, each in tokens.items() if name != "attention_mask" and _is_floating(each)]


def _is_floating(each: Any) -> bool:
    if isinstance(each, (list, tuple)):
        return len(each) > 0 and _is_floating(each[0])
    if isinstance(each, Tensor):
        return each.is_floating_point()
    return isinstance(each, float) or getattr(getattr(each, "dtype", None), "kind", "") == "f"  # NumPy's


def _rows(tokens: Tokens) -> Tensor | Sequence[Tensor | Sequence[int] | Mapping[str, Any]]:
    """A tensor of ids, or what comes one by one."""
    if not isinstance(tokens, Mapping):
        return tokens
    if tokens.get("input_ids") is None:
        raise ValueError(f"tokens has {', '.join(map(repr, tokens))}; expected 'input_ids'")
    if holds_more_than_text(tokens):
        return [tokens]
    ids, mask = tokens["input_ids"], tokens.get("attention_mask")
    if mask is None:
        return ids if isinstance(ids, Tensor) else [torch.as_tensor(row) for row in ids]
    rows = zip(ids, mask, strict=True)
    return [torch.as_tensor(row)[torch.as_tensor(kept).bool()] for row, kept in rows]


def _batch_of_one(model: nn.Module, row: Tensor | Sequence[int] | Mapping[str, Any]) -> Batch:
    if not isinstance(row, Mapping):
        ids = torch.as_tensor(row)[None]
        check_tokens(model, ids)
        return {"input_ids": ids}
    if row.get("input_ids") is None:
        raise ValueError(f"tokens has a mapping with {', '.join(map(repr, row))}; expected 'input_ids'")
    ids, mask = torch.as_tensor(row["input_ids"]), row.get("attention_mask")
    ids = ids[None] if ids.dim() == 1 else ids
    check_tokens(model, ids, special=_special_ids(model))
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(
            "tokens has a mapping with padding, which can't be told from its images: give a list with what the "
            "processor returns for each conversation by itself"
        )
    more = _more_than_text(row)
    if not more:
        return {"input_ids": ids}
    takes = inspect.signature(type(model).forward).parameters
    strange = [name for name in more if name not in takes]
    if strange:
        raise ValueError(
            f"tokens has {', '.join(strange)}, which {type(model).__name__} doesn't take; load the multimodal class, "
            "as AutoModelForImageTextToText does, or give tokens alone"
        )
    plain = [name for name in more if not _is_of_tensors(row[name])]
    if plain:
        raise ValueError(f"{', '.join(plain)} is no tensor; call the processor with return_tensors='pt'")
    open_ended = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    given = {name: each for name, each in row.items() if each is not None and (open_ended or name in takes)}
    return {**given, "input_ids": ids}


def _is_of_tensors(each: Any) -> bool:
    return all(map(_is_of_tensors, each)) if isinstance(each, (list, tuple)) else isinstance(each, Tensor)


def _special_ids(model: Any) -> set[int]:
    """Tokens that the configuration names, such as the one that stands for an image; some have no embedding."""
    config = getattr(model, "config", None)
    named = vars(config).items() if config is not None else ()
    return {each for name, each in named if name.endswith(_SPECIAL) and isinstance(each, int)}


def vocabulary(model: nn.Module) -> int | None:
    """Number of token ids the model's input embedding knows, or None when it can't be told."""
    module = embedding(model, "get_input_embeddings")
    if isinstance(module, QuantizedEmbedding):
        return module.was_rows.shape[0]
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else None


def check_tokens(model: nn.Module, tokens: Tensor, *, special: Collection[int] = ()) -> None:
    """Check that `tokens` is a LongTensor [n, seq] within the model's vocabulary, but for some ids.

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
    if size is not None and high >= size:
        high = max((each for each in tokens.unique().tolist() if each not in special), default=0)
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"tokens holds ids {low} to {high}, but the model's vocabulary is 0 to {(size or 0) - 1}; "
            "tokenise the text with this model's own tokenizer"
        )

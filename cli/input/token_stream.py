"""Tokens of a text of any length, in memory that doesn't grow with it: tokenised in pieces, kept in a file."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Characters that are tokenised at a time, and how many before a piece are tokenised with it again: where both ways
# put the end of the same token, neither end has had an influence any more.
PIECE = 2**17
OVERLAP = 2**12


def token_ids(tokenizer: Any, text: Iterable[str], piece: int = PIECE, overlap: int = OVERLAP) -> Iterator[list[int]]:
    """The ids that the tokenizer gives the whole text, a list for each piece of it.

    A tokenizer that doesn't say where its tokens lie (one in plain Python) is given the text as a whole.

    Args:
        tokenizer: of transformers.
        text: its parts, cut anywhere.
        piece: characters per call.
        overlap: how many of them are tokenised twice.
    """
    if not tokenizer.is_fast:
        yield tokenizer("".join(text))["input_ids"]
        return
    pieces = _pieces(text, piece - overlap)
    buffer = next(pieces, "")
    found = tokenizer(buffer, return_offsets_mapping=True)
    ids, offsets, begin = found["input_ids"], found["offset_mapping"], 0  # of the buffer; from which token on
    for following in pieces:
        kept = max(0, len(buffer) - overlap)
        longer = buffer[kept:] + following
        found = tokenizer(longer, return_offsets_mapping=True, add_special_tokens=False)
        end, start = _junction(offsets, found["offset_mapping"], kept, begin)
        yield ids[begin:end]
        buffer, ids, offsets, begin = longer, found["input_ids"], found["offset_mapping"], start
    yield ids[begin:]


def in_a_file(ids: Iterable[list[int]], most: int | None) -> "Tensor":
    """Ids one after the other, int32 [n], at most so many; they lie in a file that vanishes with the tensor."""
    import torch

    count = 0
    with tempfile.NamedTemporaryFile(prefix="was_fx.") as file:
        for some in ids:
            some = some if most is None else some[: most - count]
            file.write(np.asarray(some, dtype=np.int32).tobytes())
            count += len(some)
            if count == most:
                break
        file.flush()
        # The mapping keeps what the file's name no longer leads to.
        return torch.from_file(file.name, size=count, dtype=torch.int32) if count else torch.empty(0, dtype=torch.int32)


def _pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """A text in pieces of at least `size` characters but for the last, and not much more."""
    waiting: list[str] = []
    length = 0
    for part in parts:
        for start in range(0, len(part), size):
            waiting.append(part[start : start + size])
            length += len(waiting[-1])
            if length >= size:
                yield "".join(waiting)
                waiting, length = [], 0
    if waiting:
        yield "".join(waiting)


def _junction(before: list[tuple[int, int]], after: list[tuple[int, int]], kept: int, begin: int) -> tuple[int, int]:
    """Where to leave one way to tokenise a text for the next: (index before which the one ends, index where the other
    begins), at the start of a token that both have, as near to the middle of the overlap as can be.

    Args:
        before: (start, end) of the tokens of the piece that ends.
        after: of the piece that begins, which has `kept` characters fewer before it.
        kept: those.
        begin: from which token on `before` is wanted.

    Raises:
        ValueError: they have none in common.
    """
    starts = {start + kept: index for index, (start, _) in reversed(list(enumerate(after))) if _is_cut(after, index)}
    shared = [
        (index, starts[start])
        for index, (start, _) in enumerate(before[begin:], begin)
        if start in starts and _is_cut(before, index)
    ]
    if not shared:
        raise ValueError(
            "the tokenizer reads the text differently wherever it is cut, so it can't be read in pieces; give a "
            "shorter text"
        )
    middle = (kept + before[-1][1]) / 2
    return min(shared, key=lambda pair: abs(before[pair[0]][0] - middle))


def _is_cut(offsets: list[tuple[int, int]], index: int) -> bool:
    """Whether no token before that of the index reaches into it, as those of one character's bytes do."""
    return offsets[index][0] < offsets[index][1] and (index == 0 or offsets[index - 1][1] <= offsets[index][0])

"""Windows of a text begin as the tokenizer begins a text."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from was_fx.cli.input.texts import Text, cut_windows, opening_ids, windows

WORDS = [f"w{n}" for n in range(20)]
TEXT = Text("words", lambda: [" ".join(WORDS)])


def loaded(opens: bool, bos: bool = True):
    """A model's name and tokenizer, ids 1, 2, … for the words and 0 for the token that begins a text."""
    inner = Tokenizer(models.WordLevel({"<s>": 0} | {word: n for n, word in enumerate([*WORDS, "?"], 1)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>" if bos else None)
    return SimpleNamespace(tokenizer=tokenizer, name="model", positions=None)


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    found = windows(loaded(opens=True), TEXT, length=5)
    assert found.tolist() == [[0, *range(n, n + 4)] for n in (1, 5, 9, 13, 17)]
    assert found.dtype == torch.int64


def test_windows_follow_one_another_where_nothing_is_put_before_a_text():
    assert windows(loaded(opens=False), TEXT, length=5).tolist() == [list(range(n, n + 5)) for n in (1, 6, 11, 16)]


@pytest.mark.parametrize("bound", [{"limit": 2}, {"tokens": 14}])
def test_a_bound_on_windows_or_tokens_counts_the_opening_token(bound):
    assert windows(loaded(opens=True), TEXT, length=5, **bound).tolist() == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]]


def test_another_special_token_before_a_text_is_no_opening():
    assert opening_ids(loaded(opens=True, bos=False).tokenizer) == []


def test_a_window_has_room_for_more_than_the_opening_token():
    with pytest.raises(ValueError, match="--length is 1, but each window begins with 1"):
        windows(loaded(opens=True), TEXT, length=1)


def test_a_text_too_short_for_a_window_is_said():
    with pytest.raises(ValueError, match=r"words has 21 tokens, too few for one window of 30"):
        windows(loaded(opens=True), TEXT, length=30)


def test_what_does_not_fill_a_window_is_left_out():
    assert cut_windows(torch.arange(7, dtype=torch.int32), 3, [9]).tolist() == [[9, 0, 1], [9, 2, 3], [9, 4, 5]]

"""Token ids as callers have them, checked and in batches."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import was_fx
from was_fx.modules.tokens import batches, check_tokens, vocabulary

LENGTHS = (20, 7, 13, 2)


@pytest.fixture
def rows(tokens) -> list[torch.Tensor]:
    """Four sequences of unequal length."""
    return [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]


def padded(rows, side: str) -> dict[str, torch.Tensor]:
    """As a tokenizer returns them: ids that padding has too, and a mask."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, own], mask[i, own] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def ids_of(found) -> list[torch.Tensor]:
    return [batch["input_ids"] for batch, _, _ in found]


@pytest.mark.parametrize(("size", "lengths"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])])
def test_a_tensor_comes_in_batches(llama, tokens, size, lengths):
    found = list(batches(llama, tokens, size))
    assert [len(batch["input_ids"]) for batch, _, _ in found] == lengths
    assert torch.cat(ids_of(found)).equal(tokens)
    assert [total for _, _, total in found] == [4] * len(lengths)
    assert [done for _, done, _ in found] == torch.tensor(lengths).cumsum(0).tolist()


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: tuple(rows),
        lambda rows: [row.tolist() for row in rows],
        lambda rows: padded(rows, "left"),
        lambda rows: padded(rows, "right"),
        lambda rows: {key: item.tolist() for key, item in padded(rows, "left").items()},
        lambda rows: {"input_ids": [row.tolist() for row in rows]},
        lambda rows: {"input_ids": [row.tolist() for row in rows], "attention_mask": None},
    ],
    ids=["tensors", "tuple", "lists", "padded left", "padded right", "padded lists", "no mask", "mask None"],
)
def test_sequences_of_unequal_length_come_one_by_one_without_their_padding(llama, rows, form):
    found = list(batches(llama, form(rows), 3))
    assert equal(ids_of(found), [row[None] for row in rows])
    assert [(done, total) for _, done, total in found] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_mapping_without_a_mask_is_its_tensor(llama, tokens):
    assert [len(each) for each in ids_of(batches(llama, {"input_ids": tokens}, 3))] == [3, 1]


def test_a_tokenizers_output(embedded_model):
    """Of `transformers`: a mapping of its own."""
    from was_fx import embedded

    _, tokenizer = embedded.load()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["It was a dark night, and", "A book.", "The end of it all"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    found = ids_of(batches(embedded_model, encoded, 8))
    assert equal(found, [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts])


@pytest.mark.parametrize("side", ["left", "right"])
def test_calibrating_on_padded_input_equals_calibrating_on_the_sequences(llama, rows, side):
    expected = was_fx.calibrate(llama, rows)
    found = was_fx.calibrate(llama, padded(rows, side), batch_size=4)
    assert found.tokens == expected.tokens == sum(LENGTHS)
    for name, thresholds in expected.thresholds.items():
        assert found.thresholds[name].equal(thresholds), name
    with_padding = was_fx.calibrate(llama, padded(rows, side)["input_ids"])
    assert any(not with_padding.thresholds[name].equal(expected.thresholds[name]) for name in expected.thresholds)


def test_recalibrating_takes_sequences_too(llama, calibration, rows):
    schedule, steps = was_fx.uniform(calibration, 0.5), []
    found = was_fx.recalibrate(
        llama, schedule, padded(rows, "left"), rounds=2, progress=lambda *step: steps.append(step)
    )
    assert found == was_fx.recalibrate(llama, schedule, rows, rounds=2)
    assert found != schedule
    assert steps == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "tokens holds no sequence"),
        ({"ids": torch.ones(1, 4)}, ValueError, "tokens has 'ids'; expected 'input_ids'"),
        ([[1, 2], [3]], ValueError, r"shape \(1, 1\)"),
        ([[1, 2], [3, 200]], ValueError, "ids 3 to 200, but the model's vocabulary is 0 to 127"),
        ([[0.5, 1.5]], TypeError, r"tokens is torch\.float32"),
        ({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(1, 4)}, ValueError, "zip"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}, ValueError, r"shape \(1, 0\)"),
    ],
)
def test_refusals(llama, tokens, error, message):
    with pytest.raises(error, match=message):
        list(batches(llama, tokens, 1))


@pytest.mark.parametrize(("kind", "size"), [("llama", 128), ("gpt2", 96), ("linear", None)])
def test_vocabulary(llama, kind, size):
    small = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=8, vocab_size=96, bos_token_id=1, eos_token_id=2)
    models = {"llama": lambda: llama, "gpt2": lambda: GPT2LMHeadModel(small), "linear": lambda: nn.Linear(2, 2)}
    assert vocabulary(models[kind]()) == size


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([[0, 127]]),
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
        torch.tensor([[1, 2]], dtype=torch.int32),
    ],
)
def test_tokens_within_the_vocabulary_are_accepted(llama, tokens):
    assert check_tokens(llama, tokens) is None


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 4), TypeError, r"tokens is torch\.float32; expected a LongTensor"),
        (torch.zeros(1, 4, dtype=torch.bool), TypeError, r"tokens is torch\.bool"),
        (torch.zeros(1, 4, dtype=torch.uint8), TypeError, r"tokens is torch\.uint8"),
        ([[1, 2]], TypeError, "tokens is list"),
        ("text", TypeError, "tokens is str"),
        (None, TypeError, "tokens is NoneType"),
        (torch.tensor([1, 2, 3]), ValueError, r"shape \(3,\); expected \[n ≥ 1, seq ≥ 2\]"),
        (torch.zeros(1, 1, 4, dtype=torch.int64), ValueError, r"shape \(1, 1, 4\)"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, r"shape \(0, 4\)"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"shape \(2, 1\)"),
        (torch.tensor([[0, 128]]), ValueError, "ids 0 to 128, but the model's vocabulary is 0 to 127"),
        (torch.tensor([[-100, 3]]), ValueError, "ids -100 to 3"),
    ],
)
def test_other_tokens_are_refused(llama, tokens, error, message):
    with pytest.raises(error, match=message):
        check_tokens(llama, tokens)


def test_tokens_of_a_model_without_an_embedding_need_only_be_positive():
    check_tokens(nn.Linear(2, 2), torch.tensor([[0, 10**9]]))
    with pytest.raises(ValueError, match="ids -1 to 3"):
        check_tokens(nn.Linear(2, 2), torch.tensor([[-1, 3]]))

"""What was dropped while a text was written."""

import pytest
import torch

import was_fx
from was_fx.measure.answers import answer_sparsity
from was_fx.measure.realised import counting


@pytest.fixture
def sparse(llama, calibration):
    return was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5))


def test_it_is_what_counting_in_every_step_finds(sparse, tokens):
    with counting(sparse) as counts:
        text = sparse.generate(tokens[:1, :12], max_new_tokens=16, do_sample=False, eos_token_id=None)
        expected = counts.realised()
    found = answer_sparsity(sparse, text, 12)
    assert found is not None
    assert found.tokens == expected.tokens
    assert found.sparsity == pytest.approx(expected.sparsity, abs=2e-3)
    assert 0.3 < found.sparsity < 0.7


def test_only_so_many_tokens_are_read(sparse, tokens):
    found = answer_sparsity(sparse, tokens[:1], 32, most=8)
    assert found is not None
    assert set(found.tokens.values()) == {8}


@pytest.mark.parametrize("length", [12, 13])
def test_an_answer_without_a_sparse_step_has_none(sparse, tokens, length):
    assert answer_sparsity(sparse, tokens[:1, :length], 12) is None


def test_a_dense_model_has_none_and_counting_leaves_nothing(llama, sparse, tokens):
    before = sparse(tokens[:1]).logits
    assert answer_sparsity(sparse, tokens[:1], 12) is not None
    assert torch.equal(sparse(tokens[:1]).logits, before)
    assert answer_sparsity(was_fx.densify(sparse), tokens[:1], 12) is None

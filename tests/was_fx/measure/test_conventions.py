"""evaluate_text: texts scored as published tables score them."""

import math
from dataclasses import replace

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.measure.conventions import CONVENTIONS, Convention
from was_fx.measure.evaluate import evaluate


@pytest.fixture(scope="module")
def ids():
    """LongTensor [200] in the vocabulary of `llama`."""
    return torch.randint(2, 128, (200,), generator=torch.Generator().manual_seed(1))


def log_likelihoods(model, window):
    """Of each token of a window [n] but the first, given those before it."""
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, window[1:, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "length", "scored", "prefill", "decode"),
    [
        ("was", 2048, None, "sparse", False),
        ("teal", 2560, 512, "half", False),
        ("all", 2048, None, "all", False),
        ("decode-exact", 2048, None, "sparse", True),
    ],
)
def test_the_conventions_are_those_of_the_tables(name, length, scored, prefill, decode):
    assert CONVENTIONS[name] == Convention(length, scored, prefill, decode)


def test_blocks_leave_out_what_fills_none(llama, ids):
    found = was_fx.evaluate_text(llama, ids, Convention(64, None, "sparse"))
    losses = torch.cat([log_likelihoods(llama, ids[start : start + 64]) for start in (0, 64, 128)])
    assert found.tokens == len(losses) == 3 * 63
    assert found.loss == pytest.approx(-losses.mean().item(), rel=1e-5)


def test_sliding_windows_score_their_ends_as_in_teals_own_loop(llama, ids):
    context, stride, means = 48, 16, []
    length = len(ids) - len(ids) % stride
    for begin in range(0, length, stride):
        window = ids[begin : begin + context + stride]
        means.append(log_likelihoods(llama, window)[-stride:].mean())
        if begin + context + stride >= length:
            break
    found = was_fx.evaluate_text(llama, ids, Convention(context + stride, stride, "half"))
    assert found.tokens == len(means) * stride
    assert found.perplexity == pytest.approx(math.exp(-torch.stack(means).mean().item()), rel=1e-5)


def test_limit_takes_the_first_sequences(llama, ids):
    convention = Convention(64, 16, "half")
    assert was_fx.evaluate_text(llama, ids, convention, limit=2) == was_fx.evaluate_text(llama, ids[:80], convention)
    assert convention.tokens(2) == 80


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("decoded", "prompts"), [("sparse", "sparse"), ("half", "half"), ("all", "sparse")])
def test_decoding_gives_what_the_prompt_gave(llama, calibration, ids, decoded, prompts, batch_size):
    """A token sees the same in a prompt as in a decode step. Of 64 tokens 1 % is the one that decoding begins with."""
    was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5))
    sequences = ids[:192].reshape(3, 64)
    expected = evaluate(llama, sequences, prefill=prompts, batch_size=batch_size)
    found = evaluate(llama, sequences, prefill=decoded, decode=True, batch_size=batch_size)
    assert found.tokens == expected.tokens
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.realised == pytest.approx(expected.realised, abs=1e-5)


def test_a_dense_model_decodes_to_the_same_loss(llama, ids):
    sequences = ids[None, :64]
    assert evaluate(llama, sequences, decode=True).loss == pytest.approx(evaluate(llama, sequences).loss, rel=1e-5)


def test_decoding_token_by_token_is_within_one_percent_of_the_approximations(embedded_model):
    """On real text: decode steps, with their cache and kernels, against the prompts of `was` and of `teal`."""
    calibration = was_fx.calibrate(embedded_model, embedded.tokens("calibration", 256, 4))
    was_fx.sparsify(embedded_model, was_fx.uniform(calibration, 0.5))
    ids = embedded.tokens("test", 512, 1).flatten()
    for approximation in (CONVENTIONS["was"].fitted(512), CONVENTIONS["teal"].fitted(400)):
        exact = was_fx.evaluate_text(embedded_model, ids, replace(approximation, decode=True))
        found = was_fx.evaluate_text(embedded_model, ids, approximation)
        assert exact.tokens == found.tokens
        assert found.perplexity == pytest.approx(exact.perplexity, rel=0.01)
        assert found.realised == pytest.approx(exact.realised, abs=0.01)
    assert replace(CONVENTIONS["was"], decode=True) == CONVENTIONS["decode-exact"]


def test_progress_of_decoding_counts_tokens(llama, ids):
    told = []
    evaluate(llama, ids[None, :20], decode=True, progress=lambda done, of: told.append((done, of)))
    assert told == [(n, 20) for n in range(1, 21)]


def test_only_the_end_of_each_sequence_is_scored_when_decoding(llama, ids):
    whole = evaluate(llama, ids[None, :64], scored=16)
    decoded = evaluate(llama, ids[None, :64], prefill="half", scored=16, decode=True)
    assert decoded.tokens == whole.tokens == 16
    assert decoded.loss == pytest.approx(whole.loss, rel=1e-5)


def test_conventions_fit_a_model_that_takes_less():
    assert CONVENTIONS["teal"].fitted(1024) == Convention(1024, 204, "half")
    assert CONVENTIONS["was"].fitted(1024) == Convention(1024, None, "sparse")
    assert CONVENTIONS["was"].fitted(4096) == CONVENTIONS["was"].fitted(None) == CONVENTIONS["was"]


def test_tokens_may_be_a_view_of_a_file(llama, ids, tmp_path):
    path = tmp_path / "ids"
    ids.int().numpy().tofile(path)
    mapped = torch.from_file(str(path), size=len(ids), dtype=torch.int32)
    convention = Convention(64, 16, "half")
    assert was_fx.evaluate_text(llama, mapped, convention) == was_fx.evaluate_text(llama, ids, convention)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, ids: was_fx.evaluate_text(model, ids, "teel"), r"no convention 'teel' \(did you mean teal"),
        (lambda model, ids: was_fx.evaluate_text(model, ids, "was"), "200 tokens, too few for one sequence of 2048"),
        (lambda model, ids: evaluate(model, ids[None], scored=200), "scored is 200; expected at least 1 and less than"),
        (lambda model, ids: evaluate(model, ids[None], scored=0), "scored is 0"),
    ],
)
def test_refusals(llama, ids, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama, ids)

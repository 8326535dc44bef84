"""Thresholds read off a model while it drops channels, and the sparsity that they give."""

import pytest
import torch

import was_fx
from was_fx.measure.realised import counting
from was_fx.measure.sequential import realised_sparsity, uniform_while_dropping
from was_fx.modules.linears import body_linears, weight_bytes_per_token
from was_fx.schedules.score import Score


@pytest.mark.parametrize("target", [0.0, 0.5, 0.75])
def test_every_linear_drops_its_share_of_that_text(llama, tokens, target):
    schedule = uniform_while_dropping(llama, tokens, target)
    assert set(schedule.linears) == set(body_linears(llama))
    assert schedule.sparsity == pytest.approx(target)
    realised, read = realised_sparsity(llama, schedule, tokens)
    assert realised == pytest.approx(target, abs=0.005)
    everything = weight_bytes_per_token(llama)
    body = sum(linear.weight.numel() * 4 for linear in body_linears(llama).values())
    assert read == pytest.approx(everything - realised * body, abs=1)


def test_realised_is_what_the_sparse_model_counts(llama, tokens):
    schedule = uniform_while_dropping(llama, tokens, 0.5, Score(0.0, 1))
    expected, read = realised_sparsity(llama, schedule, tokens)
    everything = weight_bytes_per_token(llama)
    was_fx.sparsify(llama, schedule, prefill="all")
    with torch.no_grad(), counting(llama) as counts:
        llama(input_ids=tokens, use_cache=False)
        found = counts.realised()
    assert found.sparsity == pytest.approx(expected, abs=1e-3)
    assert everything * (1 - found.bytes_saved) == pytest.approx(read, rel=1e-3)

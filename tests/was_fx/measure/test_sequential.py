"""Thresholds read off a model while it drops channels, and the sparsity that they give."""

import pytest
import torch

import was_fx
from was_fx.measure.realised import counting
from was_fx.measure.sequential import realised_sparsity, thresholds_of, uniform_while_dropping
from was_fx.modules.linears import body_linears, dropping, head_linears, weight_bytes_per_token
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


@pytest.mark.parametrize("head", [None, 0.25])
def test_realised_is_what_the_sparse_model_counts(llama, tokens, head):
    schedule = uniform_while_dropping(llama, tokens, 0.5, Score(0.0, 1), head)
    assert schedule.linears.keys() - set(body_linears(llama)) == (set() if head is None else {"lm_head"})
    assert {schedule.linears[name].sparsity for name in head_linears(llama) if name in schedule.linears} <= {head}
    expected, read = realised_sparsity(llama, schedule, tokens)
    everything = weight_bytes_per_token(llama)
    was_fx.sparsify(llama, schedule, prefill="all")
    with torch.no_grad(), counting(llama) as counts:
        llama(input_ids=tokens, use_cache=False)
        found = counts.realised()
    assert found.sparsity == pytest.approx(expected, abs=1e-3)
    assert everything * (1 - found.bytes_saved) == pytest.approx(read, rel=1e-3)


@pytest.mark.parametrize("together", [1, 5, 64])
@torch.no_grad()
def test_a_step_of_several_tokens_reads_what_any_of_them_keeps(llama, tokens, together):
    schedule = uniform_while_dropping(llama, tokens, 0.5)
    linears = body_linears(llama)
    kept: dict[str, torch.Tensor] = {}
    thresholds = thresholds_of(schedule, linears)
    with dropping(linears, thresholds, dropped=lambda name, weak: kept.update({name: ~weak})):
        llama(input_ids=tokens, use_cache=False)
    read = everything = 0.0
    for name, mask in kept.items():
        size = linears[name].weight.numel()
        shares = [
            mask[:, step : step + together].flatten(0, 1).any(0).float().mean().item()
            for step in range(0, 64 // together * together, together)
        ]
        read, everything = read + size * sum(shares) / len(shares), everything + size
    realised, found = realised_sparsity(llama, schedule, tokens, together)
    assert realised == pytest.approx(1 - read / everything, abs=1e-5)
    assert realised < realised_sparsity(llama, schedule, tokens)[0] - 0.1
    assert found == pytest.approx(weight_bytes_per_token(llama) - 4 * realised * everything, abs=1)


def test_experts_are_refused_for_steps_of_several_tokens():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**shape, num_key_value_heads=1, vocab_size=32, num_local_experts=2)
    model, ids = MixtralForCausalLM(config).eval(), torch.arange(16)[None]
    schedule = uniform_while_dropping(model, ids, 0.5)
    with pytest.raises(ValueError, match="experts"):
        realised_sparsity(model, schedule, ids, 1)

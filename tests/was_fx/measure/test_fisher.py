"""Fisher weights: by one backward pass, against gradients taken one Linear at a time."""

import copy

import numpy as np
import pytest
import torch

import was_fx
from was_fx.measure.fisher import _gradient, dropped_costs, fisher_weights
from was_fx.modules.linears import body_linears, looking_at_inputs
from was_fx.schedules.errors import ScheduleError
from was_fx.searching.divergence import DivergenceMeter


def by_hand(model, tokens, names, seed):
    """g of each Linear: ∂L/∂y by autograd of the plain model, multiplied by its weight, labels drawn alike; of 64
    tokens without the first, no token larger than ten times 99 % of them, and no sequence than twice half of them."""
    model = copy.deepcopy(model)
    outputs = {}
    for name in names:
        module = model.get_submodule(name)

        def keep(_module, _arguments, y, name=name):
            y.retain_grad()
            outputs.setdefault(name, []).append(y)

        module.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(seed)
    for row in tokens.split(1):
        logits = model(input_ids=row, use_cache=False).logits
        logits.backward(_gradient(logits.detach(), generator))
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        squares = torch.cat([(y.grad @ weight).square() for y in outputs[name]])[:, 1:]
        for row in squares:
            sizes = row.sum(-1)
            most = 10 * torch.tensor(np.quantile(sizes.numpy(), 0.99, method="lower"))
            row[sizes > most] *= (most / sizes[sizes > most])[:, None]
        means = squares.mean(1)
        sizes = means.sum(-1)
        most = 2 * sizes.sort().values[(len(sizes) - 1) // 2]
        means[sizes > most] *= (most / sizes[sizes > most])[:, None]
        found[name] = means.mean(0).sqrt()
    return found


@pytest.mark.core
def test_weights_are_those_of_each_linear_alone(llama, tokens):
    linears = body_linears(llama)
    found = fisher_weights(llama, linears, tokens, seed=3)
    expected = by_hand(llama, tokens, linears, seed=3)
    assert found.keys() == linears.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("token", [0, 40])
def test_one_token_does_not_outweigh_all_others(llama, tokens, token):
    """The first, which is dense, and another, whose gradients are 100 times as large."""
    linears = body_linears(llama)
    plain = fisher_weights(llama, linears, tokens, seed=3)
    louder = torch.ones(1, tokens.shape[1], 1)
    louder[:, token] = 100.0
    norm = llama.model.layers[1].post_attention_layernorm
    handle = norm.register_full_backward_hook(lambda _, gradients, __: tuple(each * louder for each in gradients))
    found = fisher_weights(llama, linears, tokens, seed=3)
    handle.remove()
    name = "model.layers.1.self_attn.o_proj"
    assert found[name].norm() < 1.5 * plain[name].norm()
    assert not torch.equal(found[name], plain[name])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_one_sequence_does_not_outweigh_all_others(llama, tokens, batch_size):
    linears = body_linears(llama)
    plain = fisher_weights(llama, linears, tokens, seed=3, batch_size=batch_size)
    loudness = torch.tensor([1.0, 100.0, 1.0, 1.0]).split(batch_size)
    batch = iter(loudness)

    def louder(_module, gradients, _outputs):
        scale = next(batch)[:, None, None]
        return tuple(each * scale for each in gradients)

    handle = llama.model.layers[1].post_attention_layernorm.register_full_backward_hook(louder)
    found = fisher_weights(llama, linears, tokens, seed=3, batch_size=batch_size)
    handle.remove()
    name = "model.layers.1.self_attn.o_proj"
    assert found[name].norm() < 1.25 * plain[name].norm()
    assert not torch.equal(found[name], plain[name])


def test_sequences_are_added_as_they_come(llama, tokens, monkeypatch):
    linears = body_linears(llama)
    whole = fisher_weights(llama, linears, tokens, seed=3)
    monkeypatch.setattr("was_fx.measure.fisher._SEQUENCES", 1)
    alone = fisher_weights(llama, linears, tokens, seed=3)
    for name, weights in alone.items():
        torch.testing.assert_close(weights.square().sum(), whole[name].square().sum(), rtol=0.5, atol=0)


def test_the_gradient_is_that_of_the_drawn_labels_loss():
    logits = torch.randn(2, 3, 11, requires_grad=True)
    got = _gradient(logits.detach(), torch.Generator().manual_seed(0))
    labels = got.argmin(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(got, logits.grad)


def test_blocks_of_a_large_batch_are_run_again(llama, tokens, monkeypatch):
    calls = []
    llama.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    linears = body_linears(llama)
    found = []
    for kept in (1 << 30, 0):
        monkeypatch.setattr("was_fx.measure.fisher._KEPT", kept)
        found.append(fisher_weights(llama, linears, tokens, seed=3, batch_size=4))
        calls.append(-1)
    assert calls == [1, -1, 1, 1, -1]
    for name, weights in found[0].items():
        assert torch.equal(weights, found[1][name])


def test_the_model_is_left_as_it_was(llama, tokens):
    llama.train()
    llama.lm_head.weight.requires_grad_(False)
    asking = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    fisher_weights(llama, body_linears(llama), tokens[:1])
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == asking
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert llama.training
    assert all("forward" not in vars(block) for block in llama.model.layers)


def test_the_seed_draws_the_labels(llama, tokens):
    linears = body_linears(llama)
    first, same, other = (fisher_weights(llama, linears, tokens[:1], seed=seed) for seed in (0, 0, 1))
    name = next(iter(linears))
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_quantised_weights_have_gradients_too(llama, tokens):
    was_fx.quantize(llama, "int8")
    linears = body_linears(llama)
    dense = fisher_weights(llama, linears, tokens)
    assert all(bool((weights > 0).all()) for weights in dense.values())


def test_gradients_that_are_not_finite_are_refused(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ScheduleError, match="are NaN or infinite"):
        fisher_weights(llama, body_linears(llama), tokens[:1])


def test_costs_of_what_is_dropped_add_up_to_twice_the_divergence(llama, tokens):
    """Where little is dropped the divergence is a quadratic form, and its gradient times what is dropped twice that."""
    calibration = was_fx.calibrate(llama, tokens, fisher=True)
    schedule = was_fx.fisher(calibration, 0.05)
    linears = body_linears(llama)
    costs = dropped_costs(llama, linears, schedule, tokens, batch_size=2)
    meter = DivergenceMeter(llama, linears, calibration.fisher.weights)
    nats = sum(next(meter.measure(row, [schedule.linears])).nats for row in tokens) / len(tokens)
    assert sum(float(each.nats.sum()) for each in costs.values()) == pytest.approx(2 * nats, rel=0.15)


def test_costs_are_those_of_a_gradient_that_passes_what_is_dropped(llama, tokens):
    calibration = was_fx.calibrate(llama, tokens, fisher=True)
    schedule, linears = was_fx.fisher(calibration, 0.4), body_linears(llama)
    found = dropped_costs(llama, linears, schedule, tokens[:1])
    # The same with plain autograd: x plus a constant, a leaf for each Linear whose gradient is wanted.
    leaves, inputs = {}, {}

    def drop(name, x):
        weak = x.detach().abs() <= schedule.linears[name].channel_threshold
        weak[:, :1] = False  # of 16 tokens
        inputs[name] = x.detach() * weak
        leaves[name] = (-inputs[name]).requires_grad_()
        return x + leaves[name]

    dense = llama(tokens[:1]).logits.detach().log_softmax(-1)
    with looking_at_inputs(linears, drop):
        sparse = llama(tokens[:1]).logits.log_softmax(-1)
    torch.nn.functional.kl_div(sparse, dense, log_target=True, reduction="sum").backward()
    for name, each in found.items():
        expected = -(leaves[name].grad * inputs[name]).flatten(0, 1).sum(0) / tokens.shape[1]
        torch.testing.assert_close(each.nats, expected, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(each.squares, inputs[name].square().flatten(0, 1).sum(0) / tokens.shape[1])


def test_a_calibration_keeps_them(llama, tokens, tmp_path):
    steps = []
    made = was_fx.calibrate(llama, tokens, fisher=True, progress=lambda *step: steps.append(step))
    plain = was_fx.calibrate(llama, tokens)
    assert made.thresholds.keys() == plain.thresholds.keys()
    assert all(torch.equal(values, plain.thresholds[name]) for name, values in made.thresholds.items())
    assert plain.fisher is None
    assert made != plain
    assert steps[-1] == (12, 12)
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)
    made.save(tmp_path / "calibration.safetensors")
    assert was_fx.Calibration.load(tmp_path / "calibration.safetensors") == made

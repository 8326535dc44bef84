"""What sparse Linears drop, counted while they run."""

import pytest
import torch

import was_fx
from was_fx.measure.realised import Counting, counting
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.modules.sparse_linear import sparse_linears

FIRST = "model.layers.0.self_attn.q_proj"  # its input is the same in the dense model


@pytest.fixture
def schedule(calibration):
    return was_fx.uniform(calibration, 0.5)


@pytest.fixture
def weak(llama, schedule, tokens):
    """bool [4, 64, K]: what the first Linear drops."""
    seen = []
    handle = llama.get_submodule(FIRST).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        llama(tokens)
    handle.remove()
    norms = llama.get_submodule(FIRST).weight.detach().abs().sum(0)
    return seen[0].abs() * norms <= schedule.linears[FIRST].threshold


@torch.no_grad()
def run(model, ids, **keywords):
    return model(ids, **keywords)


def compiled(model):
    model.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    return model


@pytest.mark.parametrize("how", [lambda model: model, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize(("prefill", "first"), [("all", 0), ("half", 32), ("sparse", 1)])
def test_sparse_tokens_are_counted(llama, schedule, tokens, weak, prefill, first, how):
    model = how(was_fx.sparsify(llama, schedule, prefill=prefill))
    run(model, tokens)
    with counting(model) as counts:
        run(model, tokens)
        run(model, tokens)
        found = counts.realised()
    assert found.tokens == dict.fromkeys(schedule.linears, 2 * 4 * (64 - first))
    assert found.linears[FIRST] == pytest.approx(weak[:, first:].float().mean().item(), abs=1e-3)


def test_decode_steps_are_counted_and_dense_prompts_are_not(llama, schedule, tokens):
    model = was_fx.sparsify(llama, schedule)
    with counting(model) as counts:
        cache = run(model, tokens[:, :8], use_cache=True).past_key_values
        assert counts.realised().sparsity == 0
        assert set(counts.realised().tokens.values()) == {0}
        run(model, tokens[:, 8:9], past_key_values=cache)
        assert set(counts.realised().tokens.values()) == {4}


def test_bytes_are_those_of_the_whole_step(llama, schedule, tokens):
    model = was_fx.sparsify(llama, schedule, prefill="all")
    with counting(model) as counts:
        run(model, tokens)
        found = counts.realised()
    sizes = {name: 4 * module.weight.numel() for name, module in sparse_linears(model).items()}
    saved = sum(share * sizes[name] for name, share in found.linears.items())
    assert found.bytes_saved == pytest.approx(saved / weight_bytes_per_token(model))
    assert found.sparsity == pytest.approx(saved / sum(sizes.values()))


def test_it_begins_anew_and_ends(llama, schedule, tokens):
    model = was_fx.sparsify(llama, schedule, prefill="all")
    counts = Counting(model)
    run(model, tokens)
    counts.reset()
    assert set(counts.realised().tokens.values()) == {0}
    run(model, tokens[:1])
    assert set(counts.realised().tokens.values()) == {64}
    counts.stop()
    assert all(module.was_counts is None for module in sparse_linears(model).values())
    run(model, tokens)


def test_it_ends_when_something_fails_and_when_the_model_was_made_dense(llama, schedule):
    model = was_fx.sparsify(llama, schedule)
    with pytest.raises(KeyError), counting(model):
        raise KeyError
    assert all(module.was_counts is None for module in sparse_linears(model).values())
    with counting(model):
        was_fx.densify(model)
    assert not any(hasattr(module, "was_counts") for module in model.modules())


def test_a_dense_model_drops_nothing(llama, tokens):
    with counting(llama) as counts:
        run(llama, tokens)
        found = counts.realised()
    assert (found.sparsity, found.linears, found.tokens, found.bytes_saved) == (0.0, {}, {}, 0.0)


def test_a_linear_below_an_adapter_keeps_its_name(llama, schedule, tokens):
    peft = pytest.importorskip("peft")
    model = was_fx.sparsify(llama, schedule, prefill="all")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with counting(model) as counts:
        run(model, tokens)
        assert set(counts.realised().linears) == set(schedule.linears)

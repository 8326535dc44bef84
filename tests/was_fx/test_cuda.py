"""The same promises on a CUDA device."""

import copy

import pytest
import torch

import was_fx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # CUDA graphs are set aside for a graph that changes a tensor in place, such as the static cache's length.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TOLERANCE = {torch.float32: {"atol": 2e-3, "rtol": 1e-3}, torch.bfloat16: {"atol": 0.25, "rtol": 0.05}}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_logits_equal_the_oracle(llama, tokens, oracle, dtype, executor):
    model, ids = llama.to("cuda", dtype), tokens.cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all", executor=executor)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, **TOLERANCE[dtype])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_generate_equals_the_oracle(llama, tokens, oracle, cache, mode):
    model, ids = llama.to("cuda"), tokens[:1, :16].cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all", mode=mode)
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    assert model.generate(ids, **arguments).equal(expected.generate(ids, **arguments))


def test_numbers_change_without_recompilation_under_cuda_graphs(llama, tokens, oracle):
    from torch._dynamo.utils import counters

    model, ids = llama.to("cuda"), tokens[:1, :16].cuda()
    calibration = was_fx.calibrate(model, tokens)
    other = was_fx.uniform(calibration, target=0.7)
    expected = oracle(model, other)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    was_fx.sparsify(model, was_fx.uniform(calibration, target=0.2), prefill="all", mode="reduce-overhead")
    model.generate(ids, **arguments)
    graphs = counters["stats"]["unique_graphs"]
    was_fx.sparsify(model, other, prefill="all", mode="reduce-overhead")
    assert model.generate(ids, **arguments).equal(expected.generate(ids, **arguments))
    assert counters["stats"]["unique_graphs"] == graphs


def test_densify_restores_the_weights(llama, calibration):
    model = llama.to("cuda")
    before = copy.deepcopy(model)
    was_fx.densify(was_fx.sparsify(model, was_fx.uniform(calibration, target=0.5)))
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.equal(then)
        assert now.stride() == then.stride()

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_logits_are_as_near_to_exact_as_the_oracles(llama, tokens, oracle, dtype, executor):
    """In bf16 a channel near its threshold can fall on either side, so both are compared with fp32."""
    model, ids = llama.to("cuda", dtype), tokens.cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    exact = copy.deepcopy(expected).float()
    was_fx.sparsify(model, schedule, prefill="all", executor=executor)
    with torch.no_grad():
        wanted = exact(ids).logits
        ours, theirs = [(each(ids).logits.float() - wanted).norm() / wanted.norm() for each in (model, expected)]
    assert ours < 1.5 * theirs + 1e-5


def test_cuda_graphs_are_refused(llama, calibration):
    with pytest.raises(ValueError, match="CUDA graphs"):
        was_fx.sparsify(llama.to("cuda"), was_fx.uniform(calibration, target=0.5), mode="reduce-overhead")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_generate_equals_the_oracle(llama, tokens, oracle, cache, executor):
    """With a static cache, transformers' own compilation starts around ours."""
    model, ids = llama.to("cuda"), tokens[:1, :16].cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all", executor=executor)
    got = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert got.equal(expected.generate(ids, max_new_tokens=12, do_sample=False))


def test_densify_restores_the_weights(llama, calibration):
    model = llama.to("cuda")
    before = copy.deepcopy(model)
    was_fx.densify(was_fx.sparsify(model, was_fx.uniform(calibration, target=0.5)))
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.equal(then)
        assert now.stride() == then.stride()

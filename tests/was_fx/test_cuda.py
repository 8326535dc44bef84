"""The same promises on a CUDA device."""

import copy

import pytest
import torch
from transformers import StaticCache

import was_fx
import was_fx.compile.backend
from was_fx.compile.cuda_graphs import CudaGraphs

pytestmark = [
    pytest.mark.gpu,
    # Inductor says that fp32 products could be faster and less exact.
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),
    # So does torch of a graph of its own, when transformers compiles.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_logits_are_as_near_to_exact_as_the_oracles(llama, tokens, oracle, dtype, lowering):
    """In bf16 a channel near its threshold can fall on either side, so both are compared with fp32."""
    model, ids = llama.to("cuda", dtype), tokens.cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    exact = copy.deepcopy(expected).float()
    was_fx.sparsify(model, schedule, prefill="all", lowering=lowering)
    with torch.no_grad():
        wanted = exact(ids).logits
        ours, theirs = [(each(ids).logits.float() - wanted).norm() / wanted.norm() for each in (model, expected)]
    assert ours < 1.5 * theirs + 1e-5


@pytest.fixture
def steps(monkeypatch):
    """The `CudaGraphs` made, in order."""
    made = []

    class Recorded(CudaGraphs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(was_fx.compile.backend, "CudaGraphs", Recorded)
    return made


@pytest.fixture
def contexts(monkeypatch):
    """What the passes did to each graph that was compiled."""
    found, inner = [], was_fx.compile.backend.run
    monkeypatch.setattr(was_fx.compile.backend, "run", lambda *each: found.append(inner(*each)) or found[-1])
    return found


def sparsified(model, tokens, dtype=torch.float32):
    model = model.to("cuda", dtype)
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    return was_fx.sparsify(model, schedule)


def generate(model, ids, new=16):
    """Greedy tokens, with a static cache."""
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation="static")


def decode_by_hand(model, ids, cache, steps):
    """The logits of `steps` greedy steps [steps, V] after the prompt `ids`, with `cache`."""
    found = []
    with torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        for _ in range(steps):
            logits = model(token, past_key_values=cache).logits[:, -1]
            found.append(logits[0].clone())
            token = logits.argmax(-1, keepdim=True)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_with_a_static_cache_are_replayed(llama, tokens, steps, contexts, monkeypatch, dtype):
    ids = tokens[:1, :16].cuda()
    model = sparsified(llama, tokens, dtype)
    tokens_with = generate(model, ids)
    assert [step.captures for step in steps] == [1]
    decode = contexts[-1]
    assert (decode.decode, decode.counts["listed"]) == (True, 14)
    assert (decode.counts["fused norms"], decode.counts["decode attention"]) == (5, 2)
    torch.compiler.reset()
    monkeypatch.setattr(was_fx.compile.backend, "graphable", lambda inputs: False)
    assert generate(model, ids).equal(tokens_with)
    assert len(steps) == 1


def test_each_cache_is_a_graph(llama, tokens, steps):
    ids = tokens[:1, :16].cuda()
    model = sparsified(llama, tokens)
    fast = torch.compile(model, backend="was", dynamic=True)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    first, second = (decode_by_hand(fast, ids, cache, 6) for cache in caches)
    assert first.equal(second)
    assert [step.captures for step in steps] == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_the_same_bits(llama, tokens, dtype):
    ids = tokens[:1, :16].cuda()
    model = sparsified(llama, tokens, dtype)
    cache = StaticCache(config=model.config, max_cache_len=64)
    runs = []
    for _ in range(20):
        cache.reset()
        runs.append(decode_by_hand(model, ids, cache, 8))
    assert all(run.equal(runs[0]) for run in runs)
    tokens_of = [generate(model, ids) for _ in range(20)]
    assert all(each.equal(tokens_of[0]) for each in tokens_of)


def test_other_lengths_do_not_compile_again(llama, tokens, contexts):
    model = sparsified(llama, tokens)
    for length, new in ((16, 12), (24, 20)):
        generate(model, tokens[:1, :length].cuda(), new)
    compiled = len(contexts)
    for length, new in ((9, 30), (40, 15)):
        generate(model, tokens[:1, :length].cuda(), new)
    assert len(contexts) == compiled
    assert compiled <= 2, "one size of cache, then any"


@pytest.mark.parametrize("batch", [2, 3, 8, 9])
def test_small_batches_generate_as_the_oracle(llama, tokens, oracle, batch):
    model, ids = llama.to("cuda"), torch.cat([tokens] * 3)[:batch, :16].cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all")
    got = generate(model, ids, 12)
    assert got.equal(expected.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False))


def test_new_thresholds_reach_a_captured_step(llama, tokens, steps):
    ids = tokens[:1, :16].cuda()
    model = llama.to("cuda")
    calibration = was_fx.calibrate(model, tokens)
    was_fx.sparsify(model, was_fx.uniform(calibration, target=0.5))
    fast = torch.compile(model, backend="was", dynamic=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    sparse = decode_by_hand(fast, ids, cache, 6)
    was_fx.sparsify(model, was_fx.uniform(calibration, target=0.0))
    cache.reset()
    dense = decode_by_hand(fast, ids, cache, 6)
    assert [step.captures for step in steps] == [1]
    assert not torch.allclose(sparse, dense, rtol=1e-3)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_dense_model_with_a_schedule_replays_steps_and_sees_changed_weights(llama, tokens, steps, lowering):
    model, ids = llama.to("cuda"), tokens[:1, :16].cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    fast = torch.compile(model, backend="was", dynamic=True, options={"schedule": schedule, "lowering": lowering})
    cache = StaticCache(config=model.config, max_cache_len=64)
    captures = []
    for _ in range(3):
        twin = was_fx.sparsify(copy.deepcopy(model), schedule, lowering="eager", allow_other_model=True)
        expected = decode_by_hand(twin, ids, StaticCache(config=model.config, max_cache_len=64), 6)
        for _ in range(2):
            cache.reset()
            torch.testing.assert_close(decode_by_hand(fast, ids, cache, 6), expected, rtol=1e-3, atol=1e-4)
        captures.append(steps[-1].captures)
        with torch.no_grad():
            for name in schedule.linears:
                model.get_submodule(name).weight.mul_(1.1)
    assert captures == [1, 2, 3], "a graph for each version of the weights"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_generate_equals_the_oracle(llama, tokens, oracle, cache, lowering):
    """With a static cache, transformers' own compilation starts around ours."""
    model, ids = llama.to("cuda"), tokens[:1, :16].cuda()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all", lowering=lowering)
    got = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert got.equal(expected.generate(ids, max_new_tokens=12, do_sample=False))


def test_densify_restores_the_weights(llama, calibration):
    model = llama.to("cuda")
    before = copy.deepcopy(model)
    was_fx.densify(was_fx.sparsify(model, was_fx.uniform(calibration, target=0.5)))
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.equal(then)
        assert now.stride() == then.stride()

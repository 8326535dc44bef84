"""The decoding loop that doesn't wait, against transformers' own."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import was_fx
from was_fx.compile import backend
from was_fx.compile.cuda_graphs import CudaGraphs
from was_fx.generate import decode_loop as decoding

NEW = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def loops(monkeypatch):
    """The cache of each run of the loop, in order."""
    found, run = [], decoding._Loop.run
    monkeypatch.setattr(decoding._Loop, "run", lambda loop: found.append(loop.kwargs["past_key_values"]) or run(loop))
    return found


@pytest.fixture
def ours(llama):
    model = copy.deepcopy(llama)
    decoding.use_decode(model)
    return model


def equals_theirs(ours, theirs, prompt, **arguments):
    given = NEW | arguments
    torch.manual_seed(0)
    expected = theirs.generate(prompt, **given, cache_implementation="static")
    torch.manual_seed(0)
    return ours.generate(prompt, **given).equal(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"min_new_tokens": 12, "eos_token_id": 5, "pad_token_id": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 1},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_tokens_are_those_of_transformers(llama, ours, tokens, loops, batch, masked, arguments):
    prompt = tokens[:batch, :9]
    mask = {"attention_mask": torch.ones_like(prompt)} if masked else {}
    assert equals_theirs(ours, llama, prompt, **mask, **{k: v for k, v in arguments.items() if k[0] != "c"})
    assert ours.generate(prompt, **NEW | mask | arguments).shape[0] == batch
    assert len(loops) == 2


def test_sequences_that_end_are_padded(llama, ours, tokens, loops):
    prompt = tokens[:3, :9]
    ends = llama.generate(prompt, **NEW)[:, 9:]
    eos = int(ends[0, 3])
    assert equals_theirs(ours, llama, prompt, eos_token_id=eos, pad_token_id=1)
    assert equals_theirs(ours, llama, prompt[:1], eos_token_id=eos, pad_token_id=1)
    assert len(loops) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
    ],
    ids=["beams", "left padding", "no cache", "dynamic cache"],
)
def test_other_modes_are_left_to_transformers(llama, ours, tokens, loops, arguments):
    expected = llama.generate(tokens[:2, :9], **NEW | arguments)
    assert ours.generate(tokens[:2, :9], **NEW | arguments).equal(expected)
    assert not loops


def test_a_draft_keeps_a_cache_that_guesses_can_be_taken_out_of(llama, ours, tokens, loops):
    expected = llama.generate(tokens[:1, :9], **NEW)
    assert llama.generate(tokens[:1, :9], assistant_model=ours, **NEW).equal(expected)
    assert not loops


def test_a_streamer_gets_the_prompt_and_each_token_once(ours, tokens, loops):
    class Kept(BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.ended = True

    streamer = Kept()
    text = ours.generate(tokens[:1, :9], streamer=streamer, **NEW)
    assert streamer.ended
    assert torch.cat(streamer.parts).equal(text[0])
    assert len(loops) == 1


def test_the_cache_serves_the_next_call(llama, ours, tokens, loops):
    for length, new in ((9, 20), (9, 20), (12, 7), (9, 40)):
        expected = llama.generate(tokens[:1, :length], max_new_tokens=new, do_sample=False)
        assert ours.generate(tokens[:1, :length], max_new_tokens=new, do_sample=False).equal(expected)
    assert loops[0] is loops[1] is loops[2]
    assert loops[3] is not loops[0], "too small for this one"
    ours.generate(tokens[:2, :9], max_new_tokens=7, do_sample=False)
    assert loops[4] is not loops[3], "of another batch size"
    decoding.restore_generate(ours)
    assert ours not in decoding._kept


def test_a_callers_cache_stays_the_callers(ours, llama, tokens, loops):
    caches = [StaticCache(config=llama.config, max_cache_len=64) for _ in range(2)]
    for cache in caches:
        ours.generate(tokens[:1, :9], past_key_values=cache, **NEW)
    ours.generate(tokens[:1, :9], **NEW)
    assert loops[0] is caches[0]
    assert loops[1] is caches[1]
    assert loops[2] not in caches


def test_a_call_that_fails_leaves_no_cache_behind(ours, tokens, loops):
    ours.generate(tokens[:1, :9], **NEW)

    def fails(ids, scores, **others):
        raise RuntimeError("stopped on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours.generate(tokens[:1, :9], stopping_criteria=[fails], **NEW)
    ours.generate(tokens[:1, :9], **NEW)
    assert loops[2] is not loops[1]


def test_sparsify_leaves_generate_alone_on_a_cpu(llama, calibration):
    was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5), executor="eager")
    assert "generate" not in vars(llama)


@pytest.fixture
def shortcuts(monkeypatch):
    """Steps that went past the model, where a decode step is taken for one that CUDA graphs replay."""

    class Steps(CudaGraphs):
        def _run(self, inputs):
            return list(self._compiled(*inputs))

    found, logits = [], decoding._Shortcut.logits

    def noted(self, changing):
        result = logits(self, changing)
        if result is not None:
            found.append(result.shape)
        return result

    monkeypatch.setattr(backend, "CudaGraphs", Steps)
    monkeypatch.setattr(backend, "graphable", lambda inputs: True)
    monkeypatch.setattr(decoding._Shortcut, "logits", noted)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_from_the_third_step_on_the_graph_is_called_directly(llama, calibration, tokens, shortcuts, batch):
    model = was_fx.sparsify(copy.deepcopy(llama), was_fx.uniform(calibration, 0.5), executor="eager")
    twin = was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5), executor="eager")
    decoding.use_decode(model)
    for prompt in (tokens[:batch, :9], tokens[:batch, 5:17]):
        assert equals_theirs(model, twin, prompt)
    steps = NEW["max_new_tokens"] - 1
    assert shortcuts == [(batch, 1, llama.config.vocab_size)] * (2 * (steps - 2))


def test_new_thresholds_reach_the_next_generation(llama, calibration, tokens, shortcuts):
    model = was_fx.sparsify(llama, was_fx.uniform(calibration, 0.0), executor="eager")
    decoding.use_decode(model)
    dense = model.generate(tokens[:1, :9], **NEW)
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.7), executor="eager")
    decoding.use_decode(model)
    assert not model.generate(tokens[:1, :9], **NEW).equal(dense)
    assert shortcuts


def test_a_model_with_hooks_is_called_at_every_step(llama, calibration, tokens, shortcuts):
    llama.model.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    twin = was_fx.sparsify(copy.deepcopy(llama), was_fx.uniform(calibration, 0.5), executor="eager")
    model = was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5), executor="eager")
    decoding.use_decode(model)
    assert equals_theirs(model, twin, tokens[:1, :9])
    assert not shortcuts


def test_a_cache_that_counts_in_python_is_kept_up(tokens, shortcuts):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 128, "initializer_range": 0.1, "sliding_window": 8}
    model = MistralForCausalLM(MistralConfig(**small)).eval()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens[:, :32]), 0.5)
    twin = was_fx.sparsify(copy.deepcopy(model), schedule, executor="eager")
    decoding.use_decode(was_fx.sparsify(model, schedule, executor="eager"))
    assert equals_theirs(model, twin, tokens[:1, :5])
    assert equals_theirs(model, twin, tokens[:1, :20])

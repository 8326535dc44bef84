"""The decoding loop that doesn't wait, against transformers' own."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StaticCache

import was_fx
from was_fx.generate import decode_loop

STATIC = {"cache_implementation": "static"}

MODES = {
    "greedy": {},
    "long": {"max_new_tokens": 40},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "an end that comes": {"eos_token_id": list(range(0, 128, 5)), "pad_token_id": 1},
    "an end that may not come yet": {"min_new_tokens": 12, "eos_token_id": 5, "pad_token_id": 0},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.8},
    "sampling to an end": {"do_sample": True, "eos_token_id": list(range(0, 128, 7)), "pad_token_id": 1},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
}


def text(model, prompt, seed=0, **arguments):
    torch.manual_seed(seed)
    return model.generate(prompt, **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("model", ["llama", "sparse"])
def test_text_is_that_of_transformers(request, tokens, loops, new, model, batch, masked, mode):
    model = request.getfixturevalue(model)
    prompt = tokens[:batch, :9]
    given = new | STATIC | MODES[mode] | ({"attention_mask": torch.ones_like(prompt)} if masked else {})
    expected = text(model, prompt, **given)
    assert text(model, prompt, **given, custom_generate=was_fx.decode).equal(expected)
    assert len(loops) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_sequences_that_end_are_padded(llama, tokens, loops, new, batch):
    prompt = tokens[:batch, :9]
    ends = llama.generate(prompt, **new)[:, 9:]
    arguments = new | STATIC | {"eos_token_id": int(ends[0, 3]), "pad_token_id": 1}
    expected = llama.generate(prompt, **arguments)
    assert llama.generate(prompt, **arguments, custom_generate=was_fx.decode).equal(expected)
    assert len(loops) == 1


def test_text_up_to_a_length_of_all(llama, tokens, loops):
    arguments = STATIC | {"max_length": 20, "do_sample": False}
    expected = llama.generate(tokens[:1, :9], **arguments)
    assert expected.shape == (1, 20)
    assert llama.generate(tokens[:1, :9], **arguments, custom_generate=was_fx.decode).equal(expected)
    assert len(loops) == 1


@pytest.mark.parametrize("do_sample", [False, True])
def test_random_numbers_that_follow_are_the_same(llama, tokens, new, do_sample):
    arguments = new | STATIC | {"do_sample": do_sample, "eos_token_id": list(range(0, 128, 5)), "pad_token_id": 1}
    text(llama, tokens[:1, :9], **arguments)
    expected = torch.rand(3)
    text(llama, tokens[:1, :9], **arguments, custom_generate=was_fx.decode)
    assert torch.rand(3).equal(expected)


def user_cache(config):
    return StaticCache(config=config, max_cache_len=64)


OTHERS = {
    "beams": lambda model: {**STATIC, "num_beams": 3},
    "left padding": lambda model: {**STATIC, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)},
    "no cache": lambda model: {"use_cache": False},
    "dynamic cache": lambda model: {"cache_implementation": "dynamic"},
    "default cache": lambda model: {},
    "chunks of a prompt": lambda model: {**STATIC, "prefill_chunk_size": 4},
    "a caller's static cache": lambda model: {"past_key_values": user_cache(model.config)},
    "a caller's dynamic cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
}


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS.keys())
def test_other_modes_are_left_to_transformers(llama, tokens, loops, new, arguments):
    expected = llama.generate(tokens[:2, :9], **new | arguments(llama))
    found = llama.generate(tokens[:2, :9], **new | arguments(llama), custom_generate=was_fx.decode)
    assert found.equal(expected)
    assert not loops


@pytest.mark.parametrize("scores", [False, True])
def test_results_of_more_than_a_text_are_transformers(llama, tokens, loops, new, scores):
    arguments = new | STATIC | {"return_dict_in_generate": True, "output_scores": scores}
    expected = llama.generate(tokens[:2, :9], **arguments)
    found = llama.generate(tokens[:2, :9], **arguments, custom_generate=was_fx.decode)
    assert found.sequences.equal(expected.sequences)
    assert (found.scores is None) == (not scores)
    assert not loops


def test_a_callers_cache_holds_the_text_afterwards(llama, tokens, new):
    caches = [user_cache(llama.config) for _ in range(2)]
    llama.generate(tokens[:1, :9], past_key_values=caches[0], **new)
    llama.generate(tokens[:1, :9], past_key_values=caches[1], **new, custom_generate=was_fx.decode)
    assert int(caches[1].get_seq_length()) == int(caches[0].get_seq_length()) == 9 + 11
    torch.testing.assert_close(caches[1].layers[0].keys, caches[0].layers[0].keys)


@pytest.mark.parametrize("eos", [None, list(range(0, 128, 5))])
def test_a_streamer_gets_each_token_once(llama, tokens, loops, new, streamer, eos):
    arguments = new | STATIC | {"eos_token_id": eos, "pad_token_id": 1}
    whole = llama.generate(
        tokens[:1, :9], **arguments, custom_generate=lambda *a, **k: was_fx.decode(*a, **k, streamer=streamer)
    )
    assert streamer.ended
    assert torch.cat(streamer.parts).equal(whole[0, 9:])
    assert len(loops) == 1


class Late:
    """A step on a device that is always `behind` steps behind: an event that is asked so often before it has come."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return False

    def synchronize(self):
        self.asked = -1


@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
def test_as_many_steps_are_queued_as_may_be(llama, tokens, new, monkeypatch, ahead):
    """With tokens that never arrive by themselves: every step but the last `ahead` is waited for."""
    lengths, queue = [], decode_loop._Loop._queue

    def late(loop, length, token):
        queue(loop, length, token)
        loop.waiting[-1].event = Late()
        lengths.append(len(loop.waiting))

    monkeypatch.setattr(decode_loop._Loop, "_queue", late)
    expected = llama.generate(tokens[:1, :9], **new | STATIC)
    found = llama.generate(
        tokens[:1, :9], **new | STATIC, custom_generate=lambda *a, **k: was_fx.decode(*a, **k, ahead=ahead)
    )
    assert found.equal(expected)
    assert max(lengths) == min(ahead + 1, 12)


@pytest.mark.parametrize("ahead", [0, 4])
def test_nothing_is_left_of_steps_past_the_end(llama, tokens, new, monkeypatch, ahead, streamer):
    queue = decode_loop._Loop._queue

    def late(loop, length, token):
        queue(loop, length, token)
        loop.waiting[-1].event = Late()

    ends = llama.generate(tokens[:1, :9], **new)[0, 9:]
    arguments = new | STATIC | {"eos_token_id": int(ends[3]), "pad_token_id": 1}
    expected = llama.generate(tokens[:1, :9], **arguments)
    monkeypatch.setattr(decode_loop._Loop, "_queue", late)
    found = llama.generate(
        tokens[:1, :9],
        **arguments,
        custom_generate=lambda *a, **k: was_fx.decode(*a, **k, ahead=ahead, streamer=streamer),
    )
    assert found.equal(expected)
    assert torch.cat(streamer.parts).equal(expected[0, 9:])


def test_a_processor_sees_the_text_so_far_and_its_scores_may_be_changed(llama, tokens, new, loops):
    class Seen(LogitsProcessor):
        def __init__(self):
            self.lengths = []

        def __call__(self, ids, scores):
            self.lengths.append(ids.shape[1])
            return scores.fill_(0).index_fill(1, torch.tensor([ids.shape[1] % 128]), 5.0)

    seen = Seen()
    found = llama.generate(tokens[:1, :9], **new | STATIC, logits_processor=[seen], custom_generate=was_fx.decode)
    assert seen.lengths == list(range(9, 21))
    assert found[0, 9:].tolist() == list(range(9, 21))
    assert len(loops) == 1


def test_a_step_is_called_with_what_the_model_takes(llama, tokens, new):
    given = []

    def step(**arguments):
        given.append(arguments)
        return llama(**arguments)

    expected = llama.generate(tokens[:2, :9], **new | STATIC)
    found = llama.generate(
        tokens[:2, :9], **new | STATIC, custom_generate=lambda *a, **k: was_fx.decode(*a, **k, step=step)
    )
    assert found.equal(expected)
    assert len(given) == 11
    assert [int(each["position_ids"][0, 0]) for each in given] == list(range(9, 20))
    assert all(each["input_ids"].shape == each["position_ids"].shape == (2, 1) for each in given)


@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(2, 9, dtype=torch.long)}, True),
        ({"attention_mask": torch.tensor([[0, 1], [1, 1]])}, False),
        ({"attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)}, False),
        ({"encoder_outputs": None}, False),
        ({"past_key_values": None}, False),
    ],
    ids=["plain", "mask that says nothing", "padding", "mask of four dimensions", "unknown argument", "no cache"],
)
def test_what_the_loop_serves(llama, change, served):
    from transformers import GenerationConfig

    kwargs = {"past_key_values": user_cache(llama.config), **change}
    assert decode_loop.serves(GenerationConfig(), False, kwargs) is served
    assert not decode_loop.serves(GenerationConfig(), True, dict(kwargs))  # ranks that wait for each other

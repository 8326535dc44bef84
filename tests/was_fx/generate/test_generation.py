"""`generate` of a sparsified model: when it is ours, and with which cache."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM, StaticCache

import was_fx
from was_fx.compile.options import BackendOptions
from was_fx.generate import generation, kept_cache
from was_fx.generate.generation import Generation, use_own_generate, use_plain_generate
from was_fx.measure.realised import counting


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"min_new_tokens": 12, "eos_token_id": 5, "pad_token_id": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_tokens_are_those_of_transformers(llama, ours, tokens, loops, equals_theirs, batch, masked, arguments):
    prompt = tokens[:batch, :9]
    mask = {"attention_mask": torch.ones_like(prompt)} if masked else {}
    assert equals_theirs(ours, llama, prompt, **mask, **arguments)
    assert len(loops) == 1


def test_a_static_cache_may_be_asked_for(llama, ours, tokens, loops, new):
    expected = llama.generate(tokens[:1, :9], **new)
    assert ours.generate(tokens[:1, :9], cache_implementation="static", **new).equal(expected)
    assert isinstance(loops[0], StaticCache)


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
def test_other_modes_are_left_to_transformers(llama, ours, tokens, loops, new, arguments):
    expected = llama.generate(tokens[:2, :9], **new | arguments)
    assert ours.generate(tokens[:2, :9], **new | arguments).equal(expected)
    assert not loops


def test_a_draft_keeps_a_cache_that_guesses_can_be_taken_out_of(llama, ours, tokens, loops, new):
    expected = llama.generate(tokens[:1, :9], **new)
    assert llama.generate(tokens[:1, :9], assistant_model=ours, **new).equal(expected)
    assert not loops


@pytest.mark.parametrize("prefill", ["dense", "all"])
def test_guesses_that_a_sparsified_model_checks_are_a_prompt(llama, calibration, tokens, new, prefill):
    draft = copy.deepcopy(llama)
    draft.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5), prefill=prefill)
    lengths: list[int] = []
    llama.register_forward_pre_hook(lambda *given: lengths.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    with counting(llama) as counts:
        llama.generate(tokens[:1, :9], assistant_model=draft, **new)
        sparse = max(counts.realised().tokens.values())
    assert lengths.count(1) < len(lengths) - 1, "steps of several tokens"
    assert sparse == (sum(lengths) if prefill == "all" else lengths.count(1))


def test_a_streamer_gets_the_prompt_and_each_token_once(ours, tokens, loops, new, streamer):
    text = ours.generate(tokens[:1, :9], streamer=streamer, **new)
    assert streamer.ended
    assert torch.cat(streamer.parts).equal(text[0])
    assert len(loops) == 1


@pytest.fixture
def keeping(monkeypatch):
    """Caches are kept here as on a GPU."""
    monkeypatch.setattr(kept_cache, "may_be_kept", lambda cache: True)


@pytest.mark.usefixtures("keeping")
def test_the_cache_serves_the_next_call(llama, ours, tokens, loops):
    for length, new in ((9, 20), (9, 20), (12, 17), (9, 40)):
        expected = llama.generate(tokens[:1, :length], max_new_tokens=new, do_sample=False)
        assert ours.generate(tokens[:1, :length], max_new_tokens=new, do_sample=False).equal(expected)
    assert loops[0] is loops[1] is loops[2]
    assert loops[3] is not loops[0], "too small for this one"
    ours.generate(tokens[:2, :9], max_new_tokens=40, do_sample=False)
    assert loops[4] is not loops[3], "of another batch size"


@pytest.mark.usefixtures("keeping")
def test_a_kept_cache_is_not_handed_out_while_it_is_in_use(ours, tokens, loops, new):
    ours.generate(tokens[:1, :9], **new)

    def nested(ids, scores):
        if ids.shape[1] == 12 and len(loops) == 2:
            ours.generate(tokens[:1, :9], **new)
        return scores

    ours.generate(tokens[:1, :9], logits_processor=[nested], **new)
    assert loops[1] is loops[0]
    assert loops[2] is not loops[1]


def test_on_a_cpu_no_cache_is_kept(ours, tokens, loops, new):
    for _ in range(2):
        ours.generate(tokens[:1, :9], **new)
    assert loops[0] is not loops[1]


@pytest.mark.usefixtures("keeping")
def test_a_callers_cache_stays_the_callers(ours, llama, tokens, loops, new):
    expected = llama.generate(tokens[:1, :9], **new)
    cache = StaticCache(config=llama.config, max_cache_len=64)
    assert ours.generate(tokens[:1, :9], past_key_values=cache, **new).equal(expected)
    assert int(cache.get_seq_length()) == 20
    assert not loops
    ours.generate(tokens[:1, :9], **new)
    assert loops[0] is not cache


@pytest.mark.usefixtures("keeping")
def test_a_call_that_fails_leaves_no_cache_behind(ours, tokens, loops, new):
    ours.generate(tokens[:1, :9], **new)

    def fails(ids, scores, **others):
        raise RuntimeError("stopped on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours.generate(tokens[:1, :9], stopping_criteria=[fails], **new)
    ours.generate(tokens[:1, :9], **new)
    assert loops[2] is not loops[1]


@pytest.mark.parametrize(
    ("arguments", "ahead"),
    [
        ({}, generation.AHEAD),
        ({"logits_processor": [lambda ids, scores: scores]}, 0),
        ({"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}, 0),
        ({"prefix_allowed_tokens_fn": lambda row, ids: list(range(128))}, 0),
        ({"logits_processor": []}, generation.AHEAD),
    ],
    ids=["none", "processor", "criterion", "prefix function", "empty list"],
)
def test_callbacks_see_no_step_past_the_end(llama, ours, tokens, new, monkeypatch, arguments, ahead):
    given, decode = [], generation.decode
    monkeypatch.setattr(
        generation, "decode", lambda *a, ahead, **k: given.append(ahead) or decode(*a, ahead=ahead, **k)
    )
    expected = llama.generate(tokens[:1, :9], **new)
    assert ours.generate(tokens[:1, :9], **new | arguments).equal(expected)
    assert given == [ahead]


@pytest.mark.parametrize("free", [2**34, 2**14])
def test_a_cache_that_is_too_large_is_not_made_unasked(ours, llama, tokens, loops, new, monkeypatch, caplog, free):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**35))
    expected = llama.generate(tokens[:1, :9], **new)
    with caplog.at_level(logging.WARNING):
        assert ours.generate(tokens[:1, :9], **new).equal(expected)
    assert len(loops) == (free > 2**20)
    assert ("generate() uses a cache that grows" in caplog.text) == (free < 2**20)
    assert ours.generate(tokens[:1, :9], cache_implementation="static", **new).equal(expected)  # where it is asked for


def test_generate_is_transformers_own_on_a_cpu(sparse, tokens, loops, new):
    assert isinstance(vars(sparse)["generate"], Generation)
    by_class = LlamaForCausalLM.generate(sparse, tokens[:1, :9], **new)
    assert sparse.generate(tokens[:1, :9], **new).equal(by_class)
    assert not loops
    assert sparse.generate.step is None


def test_generate_looks_like_the_one_it_takes_the_place_of(sparse):
    assert sparse.generate.__doc__ == LlamaForCausalLM.generate.__doc__
    assert sparse.generate.__name__ == "generate"


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_generates_by_itself(sparse, tokens, new, copied):
    expected = sparse.generate(tokens[:1, :9], **new)
    other = copied(sparse)
    assert other.generate is not sparse.generate
    assert other.generate._model is other
    assert other.generate.settings == sparse.generate.settings
    was_fx.densify(sparse)
    assert other.generate(tokens[:1, :9], **new).equal(expected)


def test_same_settings_keep_what_was_compiled_and_others_do_not(llama):
    options = BackendOptions()
    use_own_generate(llama, options, None)
    first = llama.generate
    use_own_generate(llama, BackendOptions(), None)
    assert llama.generate is first
    use_own_generate(llama, options, "eager")
    assert llama.generate is not first
    use_plain_generate(llama)
    assert "generate" not in vars(llama)
    use_plain_generate(llama)


def test_inductor_on_a_cpu_compiles_the_whole_model_and_densify_takes_it_back(llama, schedule, tokens):
    dense = copy.deepcopy(llama)
    assert was_fx.sparsify(llama, schedule)._compiled_call_impl is None
    was_fx.sparsify(llama, schedule, lowering="inductor")
    assert llama._compiled_call_impl is not None
    was_fx.sparsify(llama, schedule, lowering="eager")
    assert llama._compiled_call_impl is None
    was_fx.sparsify(llama, schedule, lowering="inductor")
    was_fx.densify(llama)
    assert llama._compiled_call_impl is None
    assert torch.equal(llama(tokens).logits, dense(tokens).logits)


def test_what_the_user_compiled_stays(llama, schedule):
    llama.compile(backend="eager")
    theirs = llama._compiled_call_impl
    for lowering in ("inductor", "eager", None):
        was_fx.sparsify(llama, schedule, lowering=lowering)
        assert llama._compiled_call_impl is theirs
    was_fx.densify(llama)
    assert llama._compiled_call_impl is theirs


def test_with_eager_lowering_nothing_is_compiled_on_a_gpu_either(sparse, tokens, on_gpu, loops, new):
    on_gpu(sparse)
    sparse.generate = Generation(sparse, BackendOptions(lowering="eager"), "eager")
    sparse.generate(tokens[:1, :9], **new)
    assert not loops
    assert sparse.generate.step is None

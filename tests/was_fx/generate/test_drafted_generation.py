"""`generate()` of a dense model with a sparse draft of itself, by our loop."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessor

import was_fx
from was_fx.compile.options import BackendOptions
from was_fx.coverage.tiny_models import tiny_model
from was_fx.generate import drafted_generation, kept_cache, recorded_step
from was_fx.generate.drafted_generation import DraftedGeneration
from was_fx.generate.drafted_loop import DraftedLoop, noting_rounds
from was_fx.generate.generation import Generation
from was_fx.kernels.cpu.library import library

NEW = {"max_new_tokens": 23, "do_sample": False}
LOWERINGS = [None, pytest.param("recorded", marks=pytest.mark.skipif(library() is None, reason="no C++ compiler"))]

pytestmark = pytest.mark.filterwarnings("ignore:the schedule was made with weights")


@pytest.fixture
def drafted(llama, schedule):
    """A dense model and a draft of it; `weights` and `lowering` are those of `was_fx.draft`."""

    def make(**options):
        model = copy.deepcopy(llama)
        return model, was_fx.draft(model, schedule, **{"tokens": 4, **options})

    return make


def assisted(model, draft, prompt, **arguments):
    """The text of our loop, and its rounds."""
    with noting_rounds() as rounds:
        text = model.generate(prompt, assistant_model=draft, **{**NEW, **arguments})
    return text, rounds


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("weights", [None, "int8", {"*proj": "int4"}], ids=str)
def test_the_text_is_the_dense_models(llama, drafted, tokens, lowering, weights):
    model, draft = drafted(lowering=lowering, weights=weights)
    for row in range(3):
        prompt = tokens[row : row + 1, :9]
        text, rounds = assisted(model, draft, prompt)
        assert text.equal(llama.generate(prompt, **NEW))
        assert 1 + sum(each.accepted + 1 for each in rounds) >= NEW["max_new_tokens"]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 10, "eos_token_id": 5, "pad_token_id": 0},
        {"cache_implementation": "dynamic"},
        {"stop_strings": None, "max_time": 60.0},
    ],
    ids=str,
)
def test_it_is_so_whatever_is_asked_for(llama, drafted, tokens, lowering, arguments):
    model, draft = drafted(lowering=lowering)
    text, _ = assisted(model, draft, tokens[:1, :9], **arguments)
    assert text.equal(llama.generate(tokens[:1, :9], **NEW | arguments))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_it_ends_at_each_token_that_ends_a_text(llama, drafted, tokens, lowering):
    """Among the guesses or the model's own, in a round's middle or at its end."""
    model, draft = drafted(lowering=lowering)
    prompt = tokens[:1, :9]
    for end in set(llama.generate(prompt, **NEW)[0, 9:].tolist()):
        expected = llama.generate(prompt, eos_token_id=end, **NEW)
        assert assisted(model, draft, prompt, eos_token_id=end)[0].equal(expected)
        assert int(expected[0, -1]) == end


def test_a_criterion_of_the_callers_is_asked_after_each_token(llama, drafted, tokens):
    model, draft = drafted()
    seen = []

    def stop(ids, scores, **_):
        seen.append(ids.shape[1])
        return torch.full((1,), ids.shape[1] == 17)

    text, _ = assisted(model, draft, tokens[:1, :9], stopping_criteria=[stop])
    assert text.equal(llama.generate(tokens[:1, :9], **NEW)[:, :17])
    assert seen == list(range(10, 18))


def test_a_streamer_gets_the_prompt_and_each_token_once(drafted, tokens, streamer):
    model, draft = drafted()
    text, _ = assisted(model, draft, tokens[:1, :9], streamer=streamer)
    assert torch.cat(streamer.parts).equal(text[0])
    assert len(streamer.parts) == 1 + NEW["max_new_tokens"]
    assert streamer.ended


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
def test_steps_of_both_models_are_recorded(drafted, tokens, monkeypatch):
    made, init = [], recorded_step.RecordedStep.__init__

    def noted(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        made.append(self)

    monkeypatch.setattr(recorded_step.RecordedStep, "__init__", noted)
    model, draft = drafted(lowering="recorded", weights="int8")
    assisted(model, draft, tokens[:1, :9])
    assert [(each.declined, each._found is not None) for each in made] == [("", True)] * 2
    assert [each._found.inputs[0].shape[1] for each in made] == [1, 5]


def test_the_draft_reads_no_prompt_and_a_step_of_the_model_has_a_fixed_number(drafted, tokens):
    model, draft = drafted(lowering="recorded" if library() else None)
    lengths = {"draft": [], "model": []}
    for name, each in (("draft", draft), ("model", model)):
        each.register_forward_pre_hook(
            lambda _, __, given, name=name: lengths[name].append(given["input_ids"].shape[1]), with_kwargs=True
        )
    assisted(model, draft, tokens[:1, :9], max_new_tokens=22)
    assert set(lengths["draft"]) == {1}
    if library():
        assert lengths["model"][0] == 9
        assert set(lengths["model"][1:]) == {5}


def test_an_unsure_draft_stops_guessing(llama, drafted, tokens):
    model, draft = drafted(confidence=0.99)
    text, rounds = assisted(model, draft, tokens[:1, :9])
    assert text.equal(llama.generate(tokens[:1, :9], **NEW))
    assert {each.guessed for each in rounds[:-1]} == {1}


def test_sampled_tokens_have_the_dense_models_distribution(one_thread):
    """Each of a round's tokens, kept or drawn instead, whatever the draft's own distribution."""
    generator = torch.Generator().manual_seed(0)
    logits, off = torch.randn(2, 3, 8, generator=generator)
    p, q = torch.softmax(logits, dim=-1), torch.softmax(logits + off, dim=-1)
    config = SimpleNamespace(do_sample=True, max_length=50)
    loop = DraftedLoop(None, torch.zeros(1, 4, dtype=torch.long), None, [], config, None, guesses=2, confidence=0.0)
    found, kept = torch.zeros(3, 8), [0, 0, 0]
    torch.manual_seed(0)
    for _ in range(4000):
        loop.text[0, 4:6] = torch.multinomial(q[:2], 1)[:, 0]
        for place, token in enumerate(loop._judge(logits, [q[:1], q[1:2]]).tolist()):
            found[place, token] += 1
            kept[place] += 1
    assert kept[0] > kept[1] > kept[2] > 1000
    assert (q[:2] - p[:2]).abs().sum(dim=-1).min() > 0.3
    for place in range(3):
        assert (found[place] / kept[place] - p[place]).abs().sum() < 0.1


def test_sampling_repeats_and_a_sure_draft_is_kept(llama, calibration, tokens):
    model = copy.deepcopy(llama)
    draft = was_fx.draft(model, was_fx.uniform(calibration, 0.0), tokens=4)
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        text, rounds = assisted(model, draft, tokens[:1, :9], do_sample=True, top_k=20, temperature=0.8)
        texts.append(text)
        assert sum(each.accepted for each in rounds) == sum(each.guessed for each in rounds)
    assert texts[0].equal(texts[1])


def test_a_processor_that_forbids_the_guesses_is_heard(llama, drafted, tokens):
    class Odd(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, ids.shape[1] % 2 :: 2] = float("-inf")
            return scores

    model, draft = drafted()
    expected = llama.generate(tokens[:1, :9], logits_processor=[Odd()], **NEW)
    text, rounds = assisted(model, draft, tokens[:1, :9], logits_processor=[Odd()])
    assert text.equal(expected)
    assert sum(each.accepted for each in rounds) > 0


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_windows_that_slide_are_taken_back_right(lowering):
    """The text is longer than the window, which a cache that forgets could not go back in."""
    dense = tiny_model("mistral")
    dense.config.sliding_window = 8
    ids = torch.randint(3, 90, (4, 64), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(dense)
    draft = was_fx.draft(model, was_fx.uniform(was_fx.calibrate(model, ids), 0.5), tokens=3, lowering=lowering)
    text, rounds = assisted(model, draft, ids[:1, :20])
    assert rounds
    assert text.equal(dense.generate(ids[:1, :20], **NEW))


@pytest.mark.parametrize("kind", ["mamba", "jamba", "deepseek_v32"])
def test_a_model_with_a_state_is_refused(kind, schedule):
    with pytest.raises(ValueError, match="more than keys and values of each token, so guesses can't be taken back"):
        was_fx.draft(tiny_model(kind), schedule)


def test_what_our_loop_cannot_serve_is_transformers_own(llama, drafted, tokens, caplog):
    model, draft = drafted()
    with caplog.at_level(logging.INFO):
        found, rounds = assisted(model, draft, tokens[:1, :9], return_dict_in_generate=True)
    assert found.sequences.equal(llama.generate(tokens[:1, :9], **NEW))
    assert not rounds
    assert "transformers' own loop" in caplog.text


def test_another_assistant_is_transformers_own(llama, drafted, schedule, tokens):
    model, _ = drafted()
    other = was_fx.sparsify(copy.deepcopy(llama), schedule)
    text, rounds = assisted(model, other, tokens[:1, :9])
    assert text.equal(llama.generate(tokens[:1, :9], **NEW))
    assert not rounds
    assert model.generate(tokens[:1, :9], **NEW).equal(text)


def test_a_draft_made_dense_again_is_any_assistant(llama, drafted, tokens):
    model, draft = drafted()
    was_fx.densify(draft)
    text, rounds = assisted(model, draft, tokens[:1, :9])
    assert text.equal(llama.generate(tokens[:1, :9], **NEW))
    assert not rounds


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_generates_by_itself(llama, drafted, tokens, copied):
    model, _ = drafted()
    other = copied(model)
    assert isinstance(other.generate, DraftedGeneration)
    assert other.generate._model is other
    assert other.generate(tokens[:1, :9], **NEW).equal(llama.generate(tokens[:1, :9], **NEW))


def test_generate_of_the_users_own_stays(llama, schedule):
    mine = llama.generate = lambda *_, **__: "mine"
    was_fx.draft(llama, schedule)
    assert llama.generate is mine


def test_a_sparsified_model_forgets_its_drafts(llama, drafted, schedule):
    model, _ = drafted()
    was_fx.sparsify(model, schedule)
    assert isinstance(model.generate, Generation)
    was_fx.densify(model)
    assert type(model).generate is LlamaForCausalLM.generate
    assert "generate" not in vars(model)


def test_on_a_gpu_both_steps_are_compiled_and_serve_the_next_call(llama, drafted, tokens, shortcuts, monkeypatch):
    """As there, but that graphs run node by node. From the third on, steps go past both models."""
    monkeypatch.setattr(drafted_generation, "is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**35))
    monkeypatch.setattr(kept_cache, "may_be_kept", lambda cache: True)
    model, draft = drafted()
    draft.generate = Generation(draft, BackendOptions(lowering="eager"), None)
    caches, make = [], drafted_generation.DraftedGeneration._of

    def noted(self, draft, arguments, cache, *others):
        caches.append(cache)
        return make(self, draft, arguments, cache, *others)

    monkeypatch.setattr(drafted_generation.DraftedGeneration, "_of", noted)
    for length in (9, 12):
        text, rounds = assisted(model, draft, tokens[:1, :length])
        assert text.equal(llama.generate(tokens[:1, :length], **NEW))
        assert shortcuts.count((1, 1, 128)) == sum(each.guessed for each in rounds) - 2
        assert shortcuts.count((1, 5, 128)) == len(rounds) - 2
        shortcuts.clear()
    assert caches[0] is caches[1]
    assert draft.generate.step.declined == ""
    assert [each.declined for each in model.generate._steps.values()] == [""]

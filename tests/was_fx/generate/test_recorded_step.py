"""`generate()` with decode steps that are recorded on a CPU."""

import copy
import logging

import pytest
import torch

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.generate import recorded_step
from was_fx.kernels.cpu.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@pytest.fixture
def steps(monkeypatch):
    """Every `RecordedStep` that is made."""
    made, init = [], recorded_step.RecordedStep.__init__

    def noted(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        made.append(self)

    monkeypatch.setattr(recorded_step.RecordedStep, "__init__", noted)
    return made


def recorded(model, schedule, **options):
    return was_fx.sparsify(copy.deepcopy(model), schedule, lowering="recorded", **options)


@pytest.mark.filterwarnings("ignore:the schedule was made with weights not quantised")
@pytest.mark.parametrize("weights", [None, "int8", {"*proj": "int4"}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_text_is_the_modules(llama, schedule, tokens, new, steps, weights, batch):
    text = tokens[:1, :9].expand(batch, -1)
    expected = was_fx.sparsify(copy.deepcopy(llama), schedule, weights=weights).generate(text, **new)
    model = recorded(llama, schedule, weights=weights)
    for _ in range(2):
        assert torch.equal(model.generate(text, **new), expected)
    assert [(each.declined, each._found is not None) for each in steps] == [("", True)] * 2


def test_text_is_streamed(llama, schedule, tokens, new, streamer):
    text = recorded(llama, schedule).generate(tokens[:1, :9], streamer=streamer, **new)
    assert torch.equal(torch.cat(streamer.parts), text[0])
    assert streamer.ended


def test_sampling_repeats(llama, schedule, tokens, steps):
    model = recorded(llama, schedule)
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(model.generate(tokens[:1, :9], max_new_tokens=8, do_sample=True))
    assert torch.equal(*texts)
    assert steps[0]._found is not None


def test_hooks_are_called(llama, schedule, tokens, new, steps):
    model = recorded(llama, schedule)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(tokens[:1, :9], **new)
    assert len(calls) == new["max_new_tokens"]
    assert "hook" in steps[0].declined


def test_what_cannot_be_recorded_runs_as_it_is(llama, schedule, tokens, new, steps, caplog):
    model = recorded(llama, schedule)
    expected = was_fx.sparsify(copy.deepcopy(llama), schedule).generate(tokens[:1, :9], **new)
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) + 0 * torch.cumsum(x, -1)
    with caplog.at_level(logging.INFO):
        assert torch.equal(model.generate(tokens[:1, :9], **new), expected)
    assert "cumsum" in steps[0].declined
    assert "cumsum" in caplog.text


def test_a_number_that_counts_steps_is_noticed(llama, schedule, tokens, new, steps):
    model = recorded(llama, schedule)
    norm = model.model.norm
    forward, norm.calls = norm.forward, 0

    def counted(x):
        norm.calls += 1
        return forward(x)

    norm.forward = counted
    model.generate(tokens[:1, :9], **new)
    assert norm.calls >= new["max_new_tokens"]
    assert "differ" in steps[0].declined


def test_a_weight_that_changes_is_noticed(llama, schedule, tokens, new, streamer):
    model = recorded(llama, schedule)
    other = torch.nn.Parameter(model.model.norm.weight.detach() * 2)

    class Changing(type(streamer)):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 6:
                model.model.norm.weight = other

    watched = Changing()
    model.generate(tokens[:1, :9], streamer=watched, **new)
    plain = was_fx.sparsify(copy.deepcopy(llama), schedule)
    other_plain = torch.nn.Parameter(other.detach().clone())

    class Same(type(streamer)):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 6:
                plain.model.norm.weight = other_plain

    expected = Same()
    plain.generate(tokens[:1, :9], streamer=expected, **new)
    assert torch.equal(torch.cat(watched.parts), torch.cat(expected.parts))


def test_bad_lowering_is_said(llama, schedule, monkeypatch):
    with pytest.raises(ValueError, match=r"'recordd'.*'recorded'"):
        was_fx.sparsify(copy.deepcopy(llama), schedule, lowering="recordd")
    monkeypatch.setattr("was_fx.generate.generation.library", lambda: None)
    with pytest.raises(ValueError, match="install g"):
        recorded(llama, schedule)


@pytest.mark.parametrize("prompt", [3, 20])  # before and after windows of 8 are full
@pytest.mark.parametrize("kind", ["ministral", "cohere2", "gemma3_text", "mixtral"])
def test_what_is_not_recorded_is_done_once(kind, prompt, steps):
    """A window that moves on, counted in Python, must not move twice because a recording was tried."""
    model = tiny_model(kind)
    text = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(1))
    schedule = was_fx.uniform(was_fx.calibrate(model, text), 0.5)
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = was_fx.sparsify(model, schedule).generate(text[:1, :prompt], cache_implementation="static", **how)
    assert torch.equal(
        was_fx.sparsify(model, schedule, lowering="recorded").generate(text[:1, :prompt], **how), expected
    )
    assert steps[0].declined

"""Models that generate on a CPU as they do on a GPU."""

import copy

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import was_fx
from was_fx.compile import backend
from was_fx.compile.cuda_graphs import CudaGraphs
from was_fx.compile.options import BackendOptions
from was_fx.generate import decode_loop, generation
from was_fx.generate.direct_step import DirectStep
from was_fx.generate.generation import Generation

NEW = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def new():
    """Arguments of a greedy call of twelve new tokens."""
    return dict(NEW)


@pytest.fixture
def loops(monkeypatch):
    """The cache of each run of the loop, in order."""
    found, run = [], decode_loop._Loop.run

    def noted(loop, model_kwargs, ahead):
        found.append(next(model_kwargs[name] for name in ("past_key_values", "cache") if name in model_kwargs))
        return run(loop, model_kwargs, ahead)

    monkeypatch.setattr(decode_loop._Loop, "run", noted)
    return found


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes `generate` of a model what it is on a GPU; its graphs run node by node."""
    monkeypatch.setattr(generation, "is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**35))

    def make(model, **options):
        model.generate = Generation(model, BackendOptions(lowering="eager", **options), None)
        return model

    return make


@pytest.fixture
def shortcuts(monkeypatch):
    """The shapes of the logits of steps that went past the model."""

    class Steps(CudaGraphs):
        def _run(self, inputs):
            return list(self._compiled(*inputs))

        def replaying(self, inputs):
            def replay(others):
                assert all(others[position] is inputs[position] for position in self._in_place)
                return self._run(others)

            return replay

    found, logits = [], DirectStep.logits

    def noted(self, changing):
        result = logits(self, changing)
        if result is not None:
            found.append(tuple(result.shape))
        return result

    monkeypatch.setattr(backend, "CudaGraphs", Steps)
    monkeypatch.setattr(backend, "graphable", lambda inputs: True)
    monkeypatch.setattr(DirectStep, "logits", noted)
    return found


@pytest.fixture
def schedule(calibration):
    return was_fx.uniform(calibration, 0.5)


@pytest.fixture
def ours(llama, on_gpu):
    """A dense copy of `llama` that generates as on a GPU."""
    return on_gpu(copy.deepcopy(llama))


@pytest.fixture
def sparse(llama, schedule):
    """`llama` sparsified."""
    return was_fx.sparsify(copy.deepcopy(llama), schedule)


class Kept(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.fixture
def streamer():
    return Kept()


@pytest.fixture
def equals_theirs():
    """Whether `ours` generates what `theirs` does with transformers' own loop and a static cache."""

    def compare(ours, theirs, prompt, **arguments):
        given = NEW | arguments
        torch.manual_seed(0)
        expected = type(theirs).generate(theirs, prompt, **given, cache_implementation="static")
        torch.manual_seed(0)
        return ours.generate(prompt, **given).equal(expected)

    return compare

"""The compiled call of a decode step, and what happens where it can't be compiled."""

import pytest
import torch

import was_fx
from was_fx.generate.compiled_step import CompiledStep
from was_fx.passes import pipeline


@pytest.fixture
def contexts(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "observers", [seen.append])
    return seen


@torch.no_grad()
def test_step_is_the_models_call(sparse, schedule, tokens, contexts):
    was_fx.sparsify(sparse, schedule, prefill="all")
    step = CompiledStep(sparse, {"lowering": "eager"})
    for length in (1, 2, 3):
        given = {"input_ids": tokens[:length, :1], "use_cache": False}
        torch.testing.assert_close(step(**given).logits, sparse(**given).logits)
    assert step.declined == ""
    assert any(context.counts["sparse"] for context in contexts)


@torch.no_grad()
def test_what_cannot_be_traced_runs_as_it_is_and_is_said_once(sparse, tokens, caplog):
    calls = []

    def hook(module, inputs, output):
        torch._dynamo.graph_break()
        calls.append(output)

    sparse.model.norm.register_forward_hook(hook)
    step = CompiledStep(sparse, {"lowering": "eager"})
    given = {"input_ids": tokens[:1, :1], "use_cache": False}
    expected = sparse(**given).logits
    for _ in range(3):
        torch.testing.assert_close(step(**given).logits, expected)
    assert step.declined.startswith("Unsupported: ")
    assert len(calls) == 4
    said = [record.getMessage() for record in caplog.records if "decode steps run uncompiled" in record.getMessage()]
    assert said == [f"decode steps run uncompiled, and slower, because {step.declined}"]


@torch.no_grad()
def test_errors_of_the_model_are_its_own(sparse):
    step = CompiledStep(sparse, {"lowering": "eager"})
    with pytest.raises(Exception, match=r"embedding|index|range|Long|Int"):
        step(input_ids=torch.ones(1, 1), use_cache=False)

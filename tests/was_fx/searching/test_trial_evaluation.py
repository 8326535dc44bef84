"""Trials that go through the model as rows of one batch are those that go through it alone."""

import pytest
import torch

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.schedules.files.schedule import ScheduleMetadata
from was_fx.schedules.search.threshold_table import from_calibration
from was_fx.searching.search_trials import entries
from was_fx.searching.trial_evaluation import TrialEvaluator
from was_fx.sparse.sparsify import prompts_treated


def evaluator_of(model, tokens):
    """An evaluator of the sparsified model, and trials that raise one Linear each, of two windows."""
    table = from_calibration(was_fx.calibrate(model, tokens))
    even = dict.fromkeys(table.shapes, 0.4)
    schedule = table.schedule(even, ScheduleMetadata())
    was_fx.sparsify(model, schedule)
    points = [even, *({**even, name: 0.8} for name in list(even)[:6])]
    trials = [{"linears": entries(table, each), "window": 1, "length": 16} for each in points]
    return TrialEvaluator(model, schedule, tokens, batch_size=2), [*trials, trials[2] | {"window": 0}]


def same(found, alone):
    for one, other in zip(found, alone, strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-4, abs=1e-7)
        assert one["realised"] == pytest.approx(other["realised"], abs=1e-6)
        assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_rows_of_a_batch_drop_by_thresholds_of_their_own(llama, tokens, weights, monkeypatch):
    if weights:
        was_fx.quantize(llama, weights)
    evaluate, trials = evaluator_of(llama, tokens)
    sizes = []
    llama.register_forward_pre_hook(lambda _, arguments, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    with prompts_treated(llama, "dense"):
        together = list(evaluate.several(trials))
        assert 7 in sizes
        monkeypatch.setattr("was_fx.searching.divergence._MOST_ROWS", 3)
        in_parts = list(evaluate.several(trials))
        assert 3 in sizes
        alone = [evaluate(each) for each in trials]
    same(together, alone)
    same(in_parts, alone)
    assert len({round(each["divergence"], 6) for each in alone}) > 4
    assert all(each["divergence"] > 0 for each in alone)


def test_experts_are_evaluated_one_trial_at_a_time():
    model, tokens = tiny_model("mixtral"), torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
    evaluate, trials = evaluator_of(model, tokens)
    with prompts_treated(model, "dense"):
        assert [each["divergence"] for each in evaluate.several(trials)] == pytest.approx(
            [evaluate(each)["divergence"] for each in trials], rel=1e-6
        )


def test_losses_are_evaluated_one_trial_at_a_time(llama, tokens):
    evaluate, trials = evaluator_of(llama, tokens)
    plain = [{"linears": each["linears"], "incumbent": []} for each in trials[:2]]
    with prompts_treated(llama, "dense"):
        assert [each["losses"] for each in evaluate.several(plain)] == [evaluate(each)["losses"] for each in plain]

"""`recommend`: within the budget, on text that calibration did not see, from the log, and what it refuses."""

import json
import math

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.searching import recommendation
from was_fx.sparse.state import sparse_state

QUICK = {"speed": False, "precision": 0.05, "batch_size": 8}


@pytest.fixture(scope="module")
def dense():
    """The embedded model, which no test changes."""
    return embedded.load(torch.float32)[0]


@pytest.fixture(scope="module")
def text():
    """Windows of a text, fewer than a user would give."""
    return embedded.tokens("calibration", 32, 12)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("recommend") / "log.jsonl"


@pytest.fixture(scope="module")
def found(dense, text, log):
    """The answer for 5 % of perplexity and two formats."""
    formats = ["fp32", "int8"]
    return was_fx.recommend(dense, text, loss=math.log(1.05), weights=formats, log=log, **QUICK)


def test_the_answer_is_within_the_budget_and_a_little_more_is_not(found):
    for choice in found.choices:
        points = [point for point in found.points if point.weights == choice.weights]
        assert choice.added <= found.budget
        above = [point.target for point in points if point.target > choice.target]
        assert min(above) - choice.target <= 0.05 + 1e-9
        assert all(point.added > found.budget for point in points if point.target == min(above))
    assert {0.25, 0.4, 0.5} < {point.target for point in found.points}
    assert [point.weights for point in found.points if point.target == 0] == ["fp32", "int8"]


def test_the_best_reads_the_fewest_bytes_of_the_choices(found):
    assert found.best in found.choices
    assert found.best.bytes_per_token == min(choice.bytes_per_token for choice in found.choices)
    assert found.quantised


def test_the_schedule_gives_what_was_promised(found, text, embedded_model):
    judged = text[2::3]
    was_fx.quantize(embedded_model, found.best.weights)
    was_fx.sparsify(embedded_model, found.schedule)  # a warning would fail: its formats are the model's
    measured = was_fx.evaluate(embedded_model, judged)
    assert measured.loss == pytest.approx(found.best.loss, abs=1e-3)
    assert measured.realised == pytest.approx(found.best.realised, abs=0.01)
    assert abs(measured.realised - found.best.target) < 0.02


def test_added_is_against_the_dense_model_with_its_error(found, text, dense):
    losses = torch.tensor([was_fx.evaluate(dense, each[None]).loss for each in text[2::3]])
    first, int8 = found.points[0], next(p for p in found.points if p.weights == "int8" and p.target == 0)
    assert first.loss == pytest.approx(losses.mean().item(), abs=1e-5)
    assert first.added == first.error == 0
    assert int8.added == pytest.approx(int8.loss - first.loss, abs=1e-6)
    assert int8.error > 0


def test_the_model_is_as_before(found, dense):
    assert sparse_state(dense) is None
    fresh, _ = embedded.load(torch.float32)
    after = dense.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in fresh.state_dict().items())


def test_another_budget_takes_from_the_log(found, dense, text, log):
    before = log.read_text().splitlines()
    again = was_fx.recommend(dense, text, loss=found.budget, weights="none", log=log, resume=True, **QUICK)
    assert log.read_text().splitlines() == before, "nothing was measured"
    assert again.best == next(choice for choice in found.choices if choice.weights == "fp32")
    assert again.schedule.sparsity == pytest.approx(again.best.target)
    assert not again.quantised
    more = was_fx.recommend(dense, text, loss=0.1, weights="none", log=log, resume=True, **QUICK)
    assert more.best.target > again.best.target
    new = [json.loads(line)["trial"] for line in log.read_text().splitlines()[len(before) :]]
    assert 0 < len(new) < 5
    with pytest.raises(was_fx.ScheduleError, match="seed is 0 in the log, 1"):
        was_fx.recommend(dense, text, log=log, resume=True, seed=1, **QUICK)


def test_time_is_measured_at_the_ends_on_the_curve_and_at_the_answer(dense, text):
    small = text[:6]
    phases = []
    found = was_fx.recommend(
        dense, small[:4], validation=small[4:], loss=2.0, curve=[0.5], precision=0.5,
        progress=lambda state: phases.append(state.phase),
    )  # fmt: skip
    timed = {point.target for point in found.points if point.ms_per_token}
    assert timed == {0.0, 0.5, found.best.target}
    assert {"calibrating", "fp32 at 50 %: loss", "fp32: timing"} <= set(phases)


def test_nothing_within_the_budget_is_an_error_that_says_what_it_costs(dense, text, log, found):
    with pytest.raises(was_fx.ScheduleError, match=r"no format is within the budget of 0.1 %(?s:.)*int4-32 without"):
        was_fx.recommend(dense, text, loss=0.001, weights="int4", log=log, resume=True, **QUICK)


def test_no_sparsity_within_the_budget_is_an_error(dense, text, log, found, monkeypatch):
    monkeypatch.setattr(recommendation, "highest_within", lambda cost, budget, **_: 0.0 * cost(0.0) * cost(0.5))
    with pytest.raises(was_fx.ScheduleError, match=r"nothing but the dense model(?s:.)*fp32 at 50 % adds"):
        was_fx.recommend(dense, text, log=log, resume=True, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": 0.0}, "nats per token above 0"),
        ({"loss": float("nan")}, "nats per token above 0"),
        ({"curve": [1.5]}, "above 0 and below 1"),
        ({"weights": ["int3"]}, "expected one of int8, int4"),
        ({"weights": ["bf16"]}, "weights are fp32, not bf16"),
        ({"weights": []}, "names no format"),
        ({"tokens": torch.zeros(2, 64, dtype=torch.long)}, "the text has 2 sequences; at least 3"),
        ({"validation": torch.zeros(64, dtype=torch.long)}, "expected \\[n ≥ 1"),
    ],
)
def test_bad_input_is_refused(dense, text, arguments, message):
    with pytest.raises(ValueError, match=message):
        was_fx.recommend(dense, arguments.pop("tokens", text), **arguments)


def test_a_quantised_model_keeps_its_format(embedded_model, text):
    was_fx.quantize(embedded_model, "int8")
    with pytest.raises(ValueError, match="is int8 already and can't become int4-32"):
        was_fx.recommend(embedded_model, text, weights=["int8", "int4"])


def test_a_sparsified_model_is_refused(llama, tokens):
    was_fx.sparsify(llama, was_fx.uniform(was_fx.calibrate(llama, tokens), 0.5))
    with pytest.raises(ValueError, match="densify"):
        was_fx.recommend(llama, tokens)

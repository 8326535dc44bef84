"""Every format with every schedule, from the log where it was measured before."""

import contextlib
import copy

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.choosing.choices import Method, Subject, digest, measure_choices
from was_fx.choosing.results_log import ResultsLog
from was_fx.modules.linears import weight_bytes_per_token
from was_fx.sparse.state import sparse_state


@pytest.fixture(scope="module")
def tokens():
    return embedded.tokens("test", 64, 2)


@pytest.fixture(scope="module")
def model():
    return embedded.load(torch.float32)[0]


@pytest.fixture(scope="module")
def schedules(model, tokens):
    calibration = was_fx.calibrate(model, tokens, text="here")
    return {f"s{100 * level:.0f}": was_fx.uniform(calibration, level) for level in (0.25, 0.5)}


class Run:
    """A call of `measure_choices`, which notes what it does."""

    def __init__(self, model, tokens, schedules, log, formats=None, **method):
        self.steps, self.loads = [], 0
        self.model, self.tokens = model, tokens
        self.choices = measure_choices(
            self.load,
            schedules,
            formats or {"fp32": None, "int8": "int8"},
            method=Method(**{"speed": False, "lowering": "eager"} | method),
            log=log,
            setting={"model": "embedded"},
            watch=self.watch,
        )

    def load(self):
        self.loads += 1
        return Subject(self.model, self.tokens, lambda model: [f"{type(model).__name__} {sparse_state(model) is None}"])

    @contextlib.contextmanager
    def watch(self, what):
        self.steps.append(what)
        yield lambda *_: None


def test_losses_are_those_of_evaluate_in_each_format(model, tokens, schedules, tmp_path):
    run = Run(model, tokens, schedules, ResultsLog(tmp_path / "log.jsonl"))
    assert [(each.format, each.schedule) for each in run.choices] == [
        (format, name) for format in ("fp32", "int8") for name in (None, "s25", "s50")
    ]
    for format in ("fp32", "int8"):
        other = copy.deepcopy(model)
        if format == "int8":
            was_fx.quantize(other, "int8")
        dense = weight_bytes_per_token(other)
        for each in (each for each in run.choices if each.format == format):
            if each.schedule:
                was_fx.sparsify(other, schedules[each.schedule].replace({}, weights=None))
            found = was_fx.evaluate(other, tokens, batch_size=4)
            assert (each.loss, each.perplexity, each.realised) == (found.loss, found.perplexity, found.realised)
            assert each.linears == found.linears
            assert each.bytes_per_token == pytest.approx(dense * (1 - found.bytes_saved), abs=1)
            assert each.texts == (f"LlamaForCausalLM {each.schedule is None}",)
            assert each.ratio is None
    assert sparse_state(model) is None, "the model is given back as it was"
    assert run.loads == 1


def test_a_run_that_was_interrupted_goes_on(model, tokens, schedules, tmp_path):
    path = tmp_path / "log.jsonl"
    first = Run(model, tokens, {"s25": schedules["s25"]}, ResultsLog(path))
    again = Run(model, tokens, {"other name": schedules["s25"]}, ResultsLog(path))
    assert (again.steps, again.loads) == ([], 0)
    assert [each.loss for each in again.choices] == [each.loss for each in first.choices]
    more = Run(model, tokens, schedules, ResultsLog(path), {"fp32": None})
    assert more.steps == ["Scoring fp32, s50", "Writing with fp32, s50"]
    other = Run(model, tokens, {}, ResultsLog(path), {"fp32": None}, prefill="all")
    assert other.steps[0] == "Scoring fp32, dense", "measured in another way"


def test_speeds_compare_with_the_dense_model_of_the_same_turns(model, tokens, schedules, tmp_path):
    path = tmp_path / "log.jsonl"
    run = Run(model, tokens, {"s50": schedules["s50"]}, ResultsLog(path), speed=True, repetitions=1)
    assert [step for step in run.steps if step.startswith("Timing")] == [
        f"Timing {format}, dense and sparse in turns" for format in ("fp32", "int8")
    ]
    dense, *others = run.choices
    assert dense.ratio == 1
    for each in others:
        assert each.ms_per_token > 0
        assert each.ratio == pytest.approx(each.dense_ms / each.ms_per_token)
    again = Run(model, tokens, {"s50": schedules["s50"]}, ResultsLog(path), speed=True, repetitions=1)
    assert (again.steps, again.choices) == ([], run.choices)


def test_a_schedule_of_another_model_is_refused(model, tokens, schedules, tmp_path):
    other = schedules["s50"].replace({}, fingerprint={**schedules["s50"].metadata.fingerprint, "weights": "other"})
    with pytest.raises(was_fx.ScheduleError, match="another model"):
        Run(model, tokens, {"s": other}, ResultsLog(tmp_path / "log.jsonl"), {"fp32": None})
    assert sparse_state(model) is None


def test_the_digest_is_of_what_a_schedule_holds(schedules):
    schedule = schedules["s50"]
    name = next(iter(schedule.linears))
    assert digest(schedule) == digest(schedule.replace({}))
    assert digest(schedule) != digest(schedules["s25"])
    linear = schedule.linears[name]
    changed = was_fx.LinearSchedule(linear.sparsity, 2 * linear.threshold, linear.exponent)
    assert digest(schedule) != digest(schedule.replace({name: changed}))

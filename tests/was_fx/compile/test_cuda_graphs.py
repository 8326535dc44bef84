"""Which graph is replayed for which inputs, with a stand-in for CUDA's."""

import pytest
import torch
from torch import nn

from was_fx.compile.cuda_graphs import (
    MAX_GRAPHS,
    CudaGraphs,
    fixed_inputs,
    graphable,
    has_state,
    noting_calls,
    versioned_inputs,
)
from was_fx.modules.linears import LinearModule
from was_fx.modules.sparse_linear import make_sparse
from was_fx.modules.token_rule import TokenRule
from was_fx.passes.graph.context import Numbers, Options
from was_fx.passes.pipeline import run
from was_fx.schedules.files.linear_schedule import LinearSchedule


class Graph:
    """Runs again what was captured, on the tensors it was captured with, and writes to the same outputs."""

    def replay(self):
        self.run()


@pytest.fixture
def step(monkeypatch, request):
    """A `CudaGraphs` of a step (weight, cache, token, number) that adds to the cache in place, and its calls."""

    class Captured(CudaGraphs):
        def _capture(self, inputs, moving):
            calls = []
            compiled, self._compiled = self._compiled, lambda *each: calls.append(each) or compiled(*each)
            before = inputs[1].clone()
            found = super()._capture(inputs, moving)
            inputs[1].copy_(before)  # a capture runs nothing
            self._compiled = compiled

            def run():
                for old, new in zip(found.outputs, compiled(*calls[0]), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

            found.graph.run = run
            return found

    class Capturing:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def compiled(weight, cache, token, number):
        cache.add_(token)
        return [weight * token + number, cache, cache.view(-1)[:1], number, None]

    return Captured(compiled, {0, 1}, {0} if getattr(request, "param", None) == "versioned" else ())


def test_replays_calculate_with_the_inputs_of_their_own_call(step):
    weight, cache = torch.tensor([2.0, 3.0]), torch.zeros(2)
    results = [step(weight, cache, torch.full((2,), float(i)), 1) for i in range(5)]
    assert [y.tolist() for y, *_ in results] == [[2.0 * i + 1, 3.0 * i + 1] for i in range(5)]
    assert cache.tolist() == [10.0, 10.0]
    assert step.captures == 1


def test_a_graph_is_replayed_without_looking_at_what_stays(step, monkeypatch):
    weight, cache, token = torch.tensor([2.0, 3.0]), torch.zeros(2), torch.ones(2)
    assert step.replaying((weight, cache, token, 1)) is None
    for _ in range(2):
        assert step.replaying((weight, cache, token, 1)) is None or step.captures
        step(weight, cache, token, 1)
    replay = step.replaying((weight, cache, token, 1))
    monkeypatch.setattr(step, "_key", None)
    with noting_calls() as calls:
        results = [replay((weight, cache, torch.full((2,), float(i)), 1)) for i in range(3)]
    assert [y.tolist() for y, *_ in results] == [[2.0 * i + 1, 3.0 * i + 1] for i in range(3)]
    assert cache.tolist() == [2.0 + 3.0] * 2
    assert step.captures == 1
    assert [call.outputs for call in calls] == results


def test_outputs_that_are_an_input_are_that_input_and_others_are_kept(step):
    weight, cache = torch.ones(2), torch.zeros(2)
    for i in range(4):
        y, same, view, number, nothing = step(weight, cache, torch.ones(2), 3)
        assert same.data_ptr() == view.data_ptr() == cache.data_ptr()
        assert (number, nothing) == (3, None)
        if i == 1:
            first = y
    assert y.data_ptr() != first.data_ptr()


def test_a_number_given_as_a_tensor_belongs_to_the_graph(step):
    """As Dynamo passes a float that may change: it is read when the step is captured."""
    weight, cache = torch.ones(2), torch.zeros(2)
    for number, captures in ((1.0, 1), (4.0, 2), (1.0, 2)):
        for _ in range(3):
            y = step(weight, cache, torch.ones(2), torch.tensor(number))[0]
            assert y.tolist() == [1.0 + number] * 2
        assert step.captures == captures


def test_changed_weights_are_seen(step):
    weight, cache = torch.ones(2), torch.zeros(2)
    for _ in range(3):
        step(weight, cache, torch.ones(2), 0)
    weight.fill_(5.0)
    assert step(weight, cache, torch.ones(2), 0)[0].tolist() == [5.0, 5.0]
    assert step.captures == 1


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        (lambda w, c, t, n: (w, c, t + 1, n), 1),
        (lambda w, c, t, n: (w, c, t.clone(), n), 1),
        (lambda w, c, t, n: (w, c.clone(), t, n), 2),
        (lambda w, c, t, n: (w.clone(), c, t, n), 2),
        (lambda w, c, t, n: (w, c, t[:1].clone(), n), 2),
        (lambda w, c, t, n: (w, c, t, n + 1), 2),
    ],
    ids=["token", "place of the token", "cache", "weight", "size", "number"],
)
def test_graphs_are_of_addresses_sizes_and_numbers(step, change, captures):
    inputs = torch.ones(2), torch.zeros(2), torch.ones(2), 1
    other = change(*inputs)
    for _ in range(3):
        for each in (inputs, other):
            y = step(*each)[0]
            assert torch.equal(y, each[0] * each[2] + each[3])
    assert step.captures == captures


def test_first_call_is_not_captured(step):
    step(torch.ones(2), torch.zeros(2), torch.ones(2), 1)
    assert step.captures == 0


def test_inputs_that_a_copy_would_lay_out_anew_are_run_as_they_are(step):
    weight, cache = torch.ones(2), torch.zeros(2)
    for i in range(4):
        token = torch.full((2, 2), float(i))[:, 0]
        assert step(weight, cache, token, 0)[0].tolist() == [i, i]
    assert step.captures == 0
    assert cache.tolist() == [6.0, 6.0]


def test_graph_unused_for_longest_is_dropped(step):
    weight = torch.ones(2)
    caches = [torch.zeros(2) for _ in range(MAX_GRAPHS + 1)]
    for cache in caches[:-1]:
        for _ in range(2):
            step(weight, cache, torch.ones(2), 0)
    step(weight, caches[0], torch.ones(2), 0)
    step(weight, caches[-1], torch.ones(2), 0)  # takes the place of the second
    assert step.captures == MAX_GRAPHS
    step(weight, caches[0], torch.ones(2), 0)
    assert step.captures == MAX_GRAPHS
    for _ in range(2):
        step(weight, caches[1], torch.ones(2), 0)
    assert step.captures == MAX_GRAPHS + 1


@pytest.mark.parametrize("step", ["versioned"], indirect=True)
def test_weights_of_which_something_is_remembered_are_captured_anew_when_they_change(step):
    weight, cache = torch.ones(2), torch.zeros(2)
    for changes in range(3):
        for _ in range(3):
            assert step(weight, cache, torch.ones(2), 0)[0].tolist() == [1.0 + changes] * 2
        weight.add_(1)
    assert step.captures == 3


@pytest.mark.parametrize("step", ["versioned"], indirect=True)
def test_weights_without_a_version_are_captured_once(step):
    with torch.inference_mode():
        weight, cache = torch.ones(2), torch.zeros(2)
        for _ in range(3):
            step(weight, cache, torch.ones(2), 0)
    assert step.captures == 1


def test_calls_are_noted_while_someone_listens(step):
    inputs = torch.ones(2), torch.zeros(2), torch.ones(2), 1
    step(*inputs)
    with noting_calls() as outer:
        step(*inputs)
        with noting_calls() as inner:
            outputs = step(*inputs)
    step(*inputs)
    assert len(outer) == 2
    (call,) = inner
    assert call is outer[1]
    assert (call.step, call.inputs, call.outputs) == (step, inputs, outputs)


@pytest.mark.parametrize("devices", [(), ("cpu",), ("meta", "cpu")], ids=str)
def test_steps_off_a_gpu_are_not_captured(devices):
    with torch.no_grad():
        assert not graphable([torch.empty(1, device=device) for device in devices] + [3])


class Step(nn.Module):
    """A sparse Linear of a token, a table, and a cache that is written to."""

    def __init__(self, writes=True):
        super().__init__()
        self.linear, self.writes = nn.Linear(4, 4), writes
        self.register_buffer("table", torch.rand(4))

    def forward(self, x, position, cache, length):
        y = self.linear(x * self.table)
        if self.writes:
            cache.index_copy_(0, position, y)
            length.add_(1)
        return cache.sum(0) + x + y + length


def context_of(model, **options):
    """What the passes did to the model's step, and the inputs of its call."""
    contexts = []

    def backend(module, inputs):
        contexts.append(run(module, inputs, Options(**options)))
        return contexts[-1].module.forward

    inputs = torch.rand(1, 4), torch.tensor([2]), torch.zeros(5, 4), torch.tensor(2)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return contexts[0], inputs


def made_sparse(model):
    linear = LinearModule("linear", model.linear, False, False)
    make_sparse(linear, LinearSchedule(0.5, 0.3, 1.0), 1, TokenRule("all"))
    return model


def test_weights_thresholds_and_what_is_written_stay_where_they_are():
    model = made_sparse(Step())
    context, (x, position, cache, length) = context_of(model)
    fixed = [context.inputs[place] for place in fixed_inputs(context)]
    moving = [each for each in context.inputs if not any(each is other for other in fixed)]
    linear = model.linear
    for kept in (linear.weight, linear.bias, linear.was_threshold, model.table, cache, length):
        assert any(kept is each for each in fixed)
    assert [id(each) for each in moving] == [id(x), id(position)]
    assert has_state(context)
    assert versioned_inputs(context) == []


def test_step_that_writes_nothing_has_no_state():
    context, (_, _, cache, length) = context_of(made_sparse(Step(writes=False)))
    assert not has_state(context)
    assert not {id(cache), id(length)} & {id(context.inputs[place]) for place in fixed_inputs(context)}


@pytest.mark.parametrize(("exponent", "versioned"), [(1.0, True), (0.0, False)])
def test_weights_whose_thresholds_are_remembered_are_versioned(exponent, versioned):
    model = Step()
    context, _ = context_of(model, schedule={"linear": Numbers((4, 4), 0.3, exponent, 1)})
    assert context.counts["inserted"] == 1
    assert [context.inputs[place] is model.linear.weight for place in versioned_inputs(context)] == [True] * versioned

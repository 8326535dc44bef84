"""Which graph is replayed for which inputs, with a stand-in for CUDA's."""

import pytest
import torch

from was_fx.compile.cuda_graphs import MAX_GRAPHS, CudaGraphs, graphable


class Graph:
    """Runs again what was captured, on the tensors it was captured with, and writes to the same outputs."""

    def replay(self):
        self.run()


@pytest.fixture
def step(monkeypatch):
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

    return Captured(compiled, {0, 1})


def test_replays_calculate_with_the_inputs_of_their_own_call(step):
    weight, cache = torch.tensor([2.0, 3.0]), torch.zeros(2)
    results = [step(weight, cache, torch.full((2,), float(i)), 1) for i in range(5)]
    assert [y.tolist() for y, *_ in results] == [[2.0 * i + 1, 3.0 * i + 1] for i in range(5)]
    assert cache.tolist() == [10.0, 10.0]
    assert step.captures == 1


def test_outputs_that_are_an_input_are_that_input_and_others_are_kept(step):
    weight, cache = torch.ones(2), torch.zeros(2)
    for i in range(4):
        y, same, view, number, nothing = step(weight, cache, torch.ones(2), 3)
        assert same.data_ptr() == view.data_ptr() == cache.data_ptr()
        assert (number, nothing) == (3, None)
        if i == 1:
            first = y
    assert y.data_ptr() != first.data_ptr()


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


@pytest.mark.parametrize("devices", [(), ("cpu",), ("meta", "cpu")], ids=str)
def test_steps_off_a_gpu_are_not_captured(devices):
    with torch.no_grad():
        assert not graphable([torch.empty(1, device=device) for device in devices] + [3])

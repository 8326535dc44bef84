"""Who asks learns what served each call, and nobody else does."""

import threading

import torch

from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.kernels.parts.served import noting_served


def call(case, weight=None):
    return sparse_linear(case.x, case.weights[0] if weight is None else weight, None, case.thresholds[0], None)


def test_calls_are_noted_with_their_weights_in_order(make_case):
    case, other = make_case((1, 12), (8, 4)), make_case((1, 12), (5,), input_major=False)
    with noting_served() as served:
        call(case)
        sparse_siblings(*case.arguments(), None)
        call(other)
    places = [weight.data_ptr() for weight in case.weights]
    assert [each.weights for each in served] == [(places[0],), tuple(places), (other.weights[0].data_ptr(),)]
    assert [each.implementation for each in served] == ["cpu_gather", "cpu_gather", "dense_product"]
    assert served[2].reason == "rows of Wᵀ are not contiguous"


def test_nothing_is_noted_outside_of_the_context(make_case):
    case = make_case((1, 12), (8,))
    call(case)
    with noting_served() as served:
        pass
    call(case)
    assert served == []


def test_the_innermost_context_notes(make_case):
    case = make_case((1, 12), (8,))
    with noting_served() as outer:
        call(case)
        with noting_served() as inner:
            call(case)
            call(case)
        call(case)
    assert (len(outer), len(inner)) == (2, 2)


def test_other_threads_are_not_noted(make_case):
    case = make_case((1, 12), (8,))
    with noting_served() as served:
        thread = threading.Thread(target=call, args=(case,))
        thread.start()
        thread.join()
    assert served == []


def test_context_ends_when_a_call_fails(make_case):
    case = make_case((1, 12), (8,))
    try:
        with noting_served() as served:
            call(case, torch.zeros(3, 3))
    except ValueError:
        pass
    call(case)
    assert served == []

"""When the kernels run."""

import pytest
import torch

from was_fx.kernels.parts import triton_parts
from was_fx.kernels.parts.triton_parts import MAX_SIBLINGS, serves, slots


@pytest.mark.parametrize(
    ("dtype", "served"),
    [
        (torch.float32, True),
        (torch.float16, True),
        (torch.bfloat16, True),
        (torch.float64, False),
        (torch.int64, False),
    ],
    ids=str,
)
def test_dtypes_that_are_served(device, dtype, served):
    assert serves(torch.zeros(1, dtype=dtype, device=device)) is served


def test_cpu_tensors_are_served_by_the_interpreter_only(monkeypatch):
    monkeypatch.setattr(triton_parts, "interpreted", lambda: False)
    assert not serves(torch.zeros(1))


def test_tensors_without_data_are_not_served():
    assert not serves(torch.zeros(1, device="meta"))


def test_slots_are_filled_with_a_tensor_of_the_same_kind():
    tensors = [torch.zeros(1), torch.ones(1)]
    filled = slots(tensors)
    assert len(filled) == MAX_SIBLINGS
    assert all(a is b for a, b in zip(filled, [*tensors, tensors[0], tensors[0]], strict=True))
    assert slots([]) == [None] * MAX_SIBLINGS

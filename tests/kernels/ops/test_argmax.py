"""The column of the largest of long rows, as torch.argmax gives it."""

import pytest
import torch

from was_fx.kernels.ops.argmax import BLOCK, argmax, fits, reference
from was_fx.kernels.parts.arrivals import arrivals

SHAPES = [(1, 3 * BLOCK + 5), (1, BLOCK), (5, BLOCK + 1), (2, 1), (1, 128256)]


def numbers(shape, dtype, device):
    """Many of them are equal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).mul(4).round().to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_first_of_the_largest(shape, dtype, device):
    x = numbers(shape, dtype, device)
    counters = arrivals(x)
    for _ in range(2):
        index = argmax(x, counters)
        assert index.equal(reference(x))
        assert index.dtype == torch.int64
    assert not counters.any()
    for row, found in zip(x.tolist(), index.tolist(), strict=True):
        assert found == row.index(max(row))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-3.0, float("nan"), float("inf"), float("nan")], 1),
        ([-float("inf"), -float("inf")], 0),
        ([-1.0, -0.0, 0.0, -2.0], 1),
        ([-5.0, -2.0, -2.0], 1),
        ([0.0, float("inf"), float("inf")], 1),
    ],
)
def test_odd_numbers(row, expected, device):
    x = torch.full((2, BLOCK + 9), -float("inf"), device=device)
    x[:, : len(row)] = torch.tensor(row)
    assert argmax(x).tolist() == [expected, expected]
    x = torch.full((1, BLOCK + 9), -float("inf"), device=device)
    x[:, -len(row) :] = torch.tensor(row)
    assert argmax(x).tolist() == [0 if max(row) == -float("inf") else x.shape[1] - len(row) + expected]


def test_rows_may_lie_apart(device):
    x = numbers((6, 2 * BLOCK), torch.float32, device)
    assert argmax(x[::2]).equal(reference(x[::2]))
    assert argmax(x[:, : BLOCK + 3]).equal(reference(x[:, : BLOCK + 3]))
    columns = x.t()
    assert not fits(columns)
    assert argmax(columns).equal(reference(columns))
    assert argmax(x.double()).equal(reference(x))

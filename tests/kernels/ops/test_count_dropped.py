"""The counter of dropped channels."""

import math

import pytest
import torch

from was_fx.kernels.ops.count_dropped import count_dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_dropped_and_seen_channels_are_added(shape, dtype):
    x = torch.tensor([0.0, 0.5, -0.5, 2.0]).expand(shape).to(dtype)
    counts = torch.tensor([10, 100])
    count_dropped(x, torch.tensor([0.0, 0.4, 0.5, math.inf]), counts, 1, 0)
    tokens = x.numel() // 4
    assert counts.tolist() == [10 + 3 * tokens, 100 + 4 * tokens]


@pytest.mark.parametrize(
    ("batch", "sequence", "dense", "sparse_tokens"),
    [(1, 5, 0, 5), (1, 5, 1, 4), (2, 5, 3, 4), (3, 4, 4, 0), (2, 3, 7, 0), (4, 1, 0, 4), (4, 1, 1, 0)],
)
def test_dense_tokens_are_not_counted(batch, sequence, dense, sparse_tokens):
    x = torch.zeros(batch, sequence, 6)
    counts = torch.zeros(2, dtype=torch.int64)
    count_dropped(x, torch.ones(6), counts, sequence, dense)
    assert counts.tolist() == [sparse_tokens * 6, sparse_tokens * 6]


def test_nan_is_not_dropped():
    counts = torch.zeros(2, dtype=torch.int64)
    count_dropped(torch.tensor([[math.nan, 0.0]]), torch.tensor([1.0, 1.0]), counts, 1, 0)
    assert counts.tolist() == [1, 2]


def test_no_tokens_count_nothing():
    counts = torch.tensor([1, 2])
    count_dropped(torch.zeros(0, 4), torch.ones(4), counts, 1, 0)
    assert counts.tolist() == [1, 2]


def test_counts_go_beyond_32_bits():
    counts = torch.tensor([2**31 - 1, 2**33])
    count_dropped(torch.zeros(1, 4), torch.ones(4), counts, 1, 0)
    assert counts.tolist() == [2**31 + 3, 2**33 + 4]


@pytest.mark.parametrize(("sequence", "dense"), [(1, 0), (3, 2)])
def test_op_passes_opcheck(sequence, dense):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(count_dropped, (x, torch.full((8,), 0.5), counts, sequence, dense))

"""The counter of dropped channels."""

import math

import pytest
import torch

from was_fx.kernels.linear.sparse_linear import dropped_channels
from was_fx.kernels.ops.count_dropped import count_dropped_op as count_dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_dropped_and_seen_channels_are_added(shape, dtype):
    x = torch.tensor([0.0, 0.5, -0.5, 2.0]).expand(shape).to(dtype)
    counts = torch.tensor([10, 100])
    count_dropped(x, torch.tensor([0.0, 0.4, 0.5, math.inf]), counts, None)
    tokens = x.numel() // 4
    assert counts.tolist() == [10 + 3 * tokens, 100 + 4 * tokens]


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (2, 3, 1, 4)], ids=str)
@pytest.mark.parametrize("tokens", [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0] * 6], ids=str)
def test_only_sparse_tokens_are_counted(shape, tokens):
    x = torch.tensor([0.0, 0.5, -0.5, 2.0]).expand(shape)
    counts = torch.tensor([10, 100])
    count_dropped(x, torch.full((4,), 0.5), counts, torch.tensor(tokens, dtype=torch.bool).view(2, 3))
    assert counts.tolist() == [10 + 3 * sum(tokens), 100 + 4 * sum(tokens)]


@pytest.mark.parametrize("tokens", [None, torch.tensor([[True, False, True]])], ids=["all", "some"])
def test_counts_are_what_the_sparse_linear_drops(make_case, tokens):
    case = make_case((1, 3, 50), (7,))
    counts = torch.zeros(2, dtype=torch.int64)
    count_dropped(case.x, case.thresholds[0], counts, tokens)
    dropped = dropped_channels(case.x, case.thresholds[0], tokens)
    assert counts.tolist() == [int(dropped.sum()), 50 * (3 if tokens is None else 2)]


def test_nan_is_not_dropped():
    counts = torch.zeros(2, dtype=torch.int64)
    count_dropped(torch.tensor([[math.nan, 0.0]]), torch.tensor([1.0, 1.0]), counts, None)
    assert counts.tolist() == [1, 2]


def test_no_tokens_count_nothing():
    counts = torch.tensor([1, 2])
    count_dropped(torch.zeros(0, 4), torch.ones(4), counts, None)
    assert counts.tolist() == [1, 2]


def test_counts_go_beyond_32_bits():
    counts = torch.tensor([2**31 - 1, 2**33])
    count_dropped(torch.zeros(1, 4), torch.ones(4), counts, None)
    assert counts.tolist() == [2**31 + 3, 2**33 + 4]


@pytest.mark.parametrize("tokens", [None, torch.tensor([[True, False, True]] * 2)], ids=["all", "some"])
def test_op_passes_opcheck(tokens):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(count_dropped, (x, torch.full((8,), 0.5), counts, tokens))

"""Listing kept channels: every kept one once, in order, and no other."""

import math

import pytest
import torch

from was_fx.kernels.ops import compact
from was_fx.kernels.ops.compact import compact_op, segment_size
from was_fx.kernels.parts.triton_parts import serves

pytestmark = pytest.mark.usefixtures("loops")


def made(x, siblings, threshold=0.6745):
    random = torch.Generator().manual_seed(1)
    return [(2 * threshold * torch.rand(x.shape[-1], generator=random)).to(x.device) for _ in range(siblings)]


def expected(x, threshold):
    rows = x.reshape(-1, x.shape[-1]).float()
    return (~(rows.abs() <= threshold)).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("siblings", [1, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 333, 1024, 1025, 3000])
def test_kept_channels_are_listed_in_order(kept, device, channels, siblings):
    x = torch.randn(1, channels, device=device)
    thresholds = made(x, siblings)
    assert serves(x)
    index, count = compact.compact(x, thresholds)
    assert index.shape == (siblings, -(-channels // segment_size(channels)), segment_size(channels))
    assert (index.dtype, count.dtype) == (torch.int32, torch.int32)
    for g, threshold in enumerate(thresholds):
        assert kept(index, count, g) == expected(x, threshold)


@pytest.mark.parametrize("shape", [(100,), (1, 1, 100), (2, 1, 100), (5, 100), (8, 100)], ids=str)
def test_tokens_share_the_list_of_what_any_of_them_keeps(kept, device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    (threshold,) = made(x, 1, threshold=1.5)
    assert kept(*compact.compact(x, [threshold])) == expected(x, threshold)


@pytest.mark.parametrize(
    ("x", "threshold", "keeps"),
    [
        (0.0, 0.0, False),
        (-0.0, 0.0, False),
        (1e-6, 0.0, True),
        (0.5, 0.5, False),
        (-0.5, 0.5, False),
        (-0.75, 0.5, True),
        (math.inf, 1e38, True),
        (-math.inf, 1e38, True),
        (math.inf, math.inf, False),
        (math.nan, 0.5, True),
        (math.nan, math.inf, True),
    ],
)
def test_channel_is_kept_unless_its_magnitude_is_at_most_the_threshold(kept, device, dtype, x, threshold, keeps):
    x = torch.tensor([[1.0, x, 0.0]], device=device).to(dtype)
    x[0, 1] = x[0, 1] if x[0, 1] != 0 or not keeps else 1e-4  # 1e-6 is no fp16
    threshold = torch.tensor([0.0, threshold, 0.0], device=device)
    assert kept(*compact.compact(x, [threshold])) == ([0, 1] if keeps else [0])
    assert kept(*compact.reference(x, [threshold])) == ([0, 1] if keeps else [0])


@pytest.mark.parametrize(("threshold", "keeps"), [(math.inf, 0), (0.0, 1500)])
def test_nothing_or_everything_is_kept(kept, device, threshold, keeps):
    x = torch.randn(1, 1500, device=device)
    index, count = compact.compact(x, [torch.full((1500,), threshold, device=device)])
    assert kept(index, count) == list(range(keeps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_thresholds_are_compared_in_fp32(kept, dtype):
    x = torch.tensor([[0.5, 0.5]], dtype=dtype)
    assert kept(*compact.reference(x, [torch.tensor([0.5001, 0.4999])])) == [1]


def test_strided_input_is_read_where_it_is(kept, device):
    x = torch.randn(1, 200, device=device)[:, ::2]
    (threshold,) = made(x, 1)
    assert kept(*compact.compact(x, [threshold])) == expected(x, threshold)


def test_double_precision_is_compared_as_it_is(kept, device):
    x = torch.tensor([[0.5 + 1e-12, 0.5]], dtype=torch.float64, device=device)
    assert not serves(x)
    assert kept(*compact.compact(x, [torch.full((2,), 0.5, device=device)])) == [0]


@pytest.mark.parametrize("channels", [1, 37, 1500])
def test_reference_lists_the_same_segments(kept, device, channels):
    x = torch.randn(2, channels, device=device)
    thresholds = made(x, 2)
    ours, theirs = compact.compact(x, thresholds), compact.reference(x, thresholds)
    assert torch.equal(ours[1], theirs[1])
    assert [kept(*ours, g) for g in range(2)] == [kept(*theirs, g) for g in range(2)]


@pytest.mark.parametrize("siblings", [1, 2])
def test_op_passes_opcheck(device, siblings):
    x = torch.randn(1, 1, 40, device=device)
    # What lies behind the listed channels is undefined, so results are not compared.
    torch.library.opcheck(compact_op, (x, made(x, siblings)), test_utils=("test_schema", "test_faketensor"))

"""Products with the listed channels only, against fp64."""

import math

import pytest
import torch

from was_fx.kernels.linear import gather_gemv
from was_fx.kernels.linear.gather_gemv import gather_gemv_op, supports
from was_fx.kernels.ops import compact
from was_fx.kernels.parts.gemv_config import GemvConfig

pytestmark = pytest.mark.usefixtures("loops")

SMALL = GemvConfig(rows=32, columns=64, splits=3, warps=4)


def run(case, device, splits=2, config=SMALL):
    """y [M, ΣN] in fp32 of a `Case`, its parts added."""
    x = case.x.to(device)
    weights = [weight.t().to(device).t() for weight in case.weights]
    thresholds = [threshold.to(device) for threshold in case.thresholds]
    assert supports(x, weights)
    index, count = compact.compact(x, thresholds)
    partial = gather_gemv.gather_gemv(x, index, count, weights, splits, config)
    reference = gather_gemv.reference(x, index, count, weights, splits)
    assert (partial.shape, partial.dtype) == (reference.shape, torch.float32)
    torch.testing.assert_close(partial, reference, rtol=1e-4, atol=1e-4, equal_nan=True)
    return partial.sum(0).cpu().view(*case.x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("k", "n"), [(1, 1), (1, 5), (5, 1), (7, 11), (64, 48), (333, 129), (1025, 32), (2100, 40), (19, 400)], ids=str
)
def test_product_is_accurate(make_case, error, device, dtype, k, n):
    case = make_case((1, k), (n,), dtype)
    assert error(run(case, device), case.exact()) < 2e-6


@pytest.mark.parametrize("outputs", [(32, 32), (8, 4, 4), (5, 40, 1), (1, 1, 1, 1), (33, 31, 64, 7)], ids=str)
def test_siblings_have_lists_and_weights_of_their_own(make_case, error, device, dtype, outputs):
    case = make_case((1, 50), outputs, dtype)
    assert error(run(case, device), case.exact()) < 2e-6


@pytest.mark.parametrize("splits", [1, 7, 16])
@pytest.mark.parametrize("k", [3, 100])
def test_any_number_of_splits_gives_the_same_sum(make_case, error, device, k, splits):
    case = make_case((1, k), (40,))
    assert error(run(case, device, splits), case.exact()) < 2e-6


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 128), (1, 64)])
def test_any_tile_gives_the_same_sum(make_case, error, device, rows, columns):
    case = make_case((1, 50), (70, 20))
    config = GemvConfig(rows=rows, columns=columns, splits=2, warps=4)
    assert error(run(case, device, 2, config), case.exact()) < 2e-6


def test_nothing_kept_gives_zero(make_case, device):
    case = make_case((1, 100), (20, 30))
    case.thresholds = [torch.full((100,), math.inf) for _ in case.thresholds]
    assert run(case, device).eq(0).all()


def test_everything_kept_is_the_dense_product(make_case, error, device):
    case = make_case((1, 100), (20, 30), threshold=0)
    dense = case.x.double() @ torch.cat(case.weights).double().t()
    assert error(run(case, device), dense) < 2e-6


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kept_nonfinite_input_spoils_every_output(make_case, device, bad):
    case = make_case((1, 40), (20,))
    case.x[0, 7] = bad
    assert not torch.isfinite(run(case, device)).any()


def test_weights_of_dropped_channels_are_not_read(make_case, device):
    case = make_case((1, 40), (20,))
    dropped = case.x[0].abs() <= case.thresholds[0]
    clean = run(case, device)
    case.weights[0][:, dropped] = math.nan
    assert torch.equal(run(case, device), clean)


def test_sums_are_the_same_bits_each_time(make_case, device, dtype):
    case = make_case((1, 150), (90, 30), dtype)
    first = run(case, device)
    assert all(torch.equal(run(case, device), first) for _ in range(2))


@pytest.mark.parametrize(
    ("rows", "dtype", "input_major", "served"),
    [
        (1, torch.float32, True, True),
        (1, torch.float16, True, True),
        (2, torch.float32, True, False),
        (0, torch.float32, True, False),
        (1, torch.float64, True, False),
        (1, torch.float32, False, False),
    ],
    ids=str,
)
def test_one_token_and_input_major_weights_are_served(make_case, device, rows, dtype, input_major, served):
    case = make_case((rows, 12), (8, 4), dtype, input_major=input_major)
    weights = [w.to(device) if not input_major else w.t().to(device).t() for w in case.weights]
    assert supports(case.x.to(device), weights) is served


def test_weight_of_another_dtype_is_not_served(make_case, device):
    case = make_case((1, 12), (8,))
    assert not supports(case.x.to(device), [case.weights[0].to(device).half()])


def test_op_passes_opcheck(make_case, device):
    case = make_case((1, 40), (5, 20))
    x, thresholds = case.x.to(device), [t.to(device) for t in case.thresholds]
    weights = [weight.t().to(device).t() for weight in case.weights]
    arguments = (x, *compact.compact(x, thresholds), weights, 2)
    torch.library.opcheck(gather_gemv_op, arguments, test_utils=("test_schema", "test_faketensor"))

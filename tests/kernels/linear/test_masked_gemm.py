"""Products of a few tokens that are masked on the way, against fp64."""

import math

import pytest
import torch

from was_fx.kernels.linear import masked_gemm
from was_fx.kernels.linear.masked_gemm import MaskedGemmConfig, masked_gemm_config, masked_gemm_op, supports
from was_fx.kernels.parts.served import noting_served

pytestmark = pytest.mark.usefixtures("loops")

SMALL = MaskedGemmConfig(rows=32, columns=64, splits=2, warps=4, stages=3)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    """What the kernel multiplies."""
    return request.param


def run(case, device, splits=2, config=SMALL):
    """y [M, ΣN] in fp32 of a `Case`, its parts added."""
    x = case.x.to(device)
    weights = [weight.t().to(device).t() for weight in case.weights]
    thresholds = [threshold.to(device) for threshold in case.thresholds]
    assert supports(x, weights)
    partial = masked_gemm.masked_gemm(x, weights, thresholds, splits, config)
    reference = masked_gemm.reference(x, weights, thresholds, splits)
    assert (partial.shape, partial.dtype) == (reference.shape, torch.float32)
    return partial.sum(0).cpu().view(*case.x.shape[:-1], -1)


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 16])
@pytest.mark.parametrize(
    ("k", "n"), [(1, 1), (1, 5), (5, 1), (7, 11), (64, 48), (333, 129), (1025, 32), (19, 400)], ids=str
)
def test_product_is_accurate(make_case, error, device, dtype, tokens, k, n):
    case = make_case((tokens, k), (n,), dtype, threshold=0.1 if k == 1 else 0.6745)
    assert error(run(case, device), case.exact()) < 2e-6


@pytest.mark.parametrize("outputs", [(32, 32), (8, 4, 4), (5, 40, 1), (1, 1, 1, 1), (33, 31, 64, 7)], ids=str)
def test_siblings_have_thresholds_and_weights_of_their_own(make_case, error, device, dtype, outputs):
    case = make_case((3, 50), outputs, dtype)
    assert error(run(case, device), case.exact()) < 2e-6


@pytest.mark.parametrize("splits", [1, 2, 7, 16])
@pytest.mark.parametrize("k", [3, 100, 500])
def test_any_number_of_splits_gives_the_same_sum(make_case, error, device, k, splits):
    case = make_case((4, k), (40,), torch.float16)
    assert error(run(case, device, splits), case.exact()) < 2e-6


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 128), (128, 32)])
@pytest.mark.parametrize("k", [50, 128])  # with and without a rest
def test_any_tile_gives_the_same_sum(make_case, error, device, rows, columns, k):
    case = make_case((4, k), (70, 20), torch.float16)
    config = MaskedGemmConfig(rows, columns, 2, warps=4, stages=2)
    assert error(run(case, device, 2, config), case.exact()) < 2e-6


def test_nothing_kept_gives_zero(make_case, device, dtype):
    case = make_case((4, 100), (20, 30), dtype)
    case.thresholds = [torch.full((100,), math.inf) for _ in case.thresholds]
    assert run(case, device).eq(0).all()


def test_everything_kept_is_the_dense_product(make_case, error, device, dtype):
    case = make_case((4, 100), (20, 30), dtype, threshold=0)
    dense = case.x.double() @ torch.cat(case.weights).double().t()
    assert error(run(case, device), dense) < 2e-6


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kept_nonfinite_input_spoils_its_own_token_only(make_case, device, dtype, bad):
    case = make_case((3, 40), (20,), dtype)
    case.x[-1, 7] = bad
    y = run(case, device)
    assert torch.isfinite(y[:-1]).all()
    assert not torch.isfinite(y[-1]).any()


@pytest.mark.parametrize(
    ("x", "threshold", "kept"),
    [
        (0.5, 0.5, False),
        (-0.5, 0.5, False),
        (0.5, 0.49999997, True),  # compared in fp32
        (math.nan, 0.5, True),
        (math.nan, math.inf, True),
        (math.inf, math.inf, False),
        (0.5, math.nan, True),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_channel_is_dropped_when_its_magnitude_is_at_most_the_threshold(make_case, device, x, threshold, kept):
    case = make_case((2, 24), (20,), torch.float16, threshold=0)
    case.x[:, 3], case.thresholds[0][3] = x, threshold
    case.weights[0][:, 3] = 1.0
    without = make_case((2, 24), (20,), torch.float16, threshold=0)
    without.x[:, 3] = x if kept else 0
    torch.testing.assert_close(
        run(case, device), run_dense(without, case.weights), rtol=1e-5, atol=1e-5, equal_nan=True
    )


def run_dense(case, weights):
    """y [M, N] of every channel, in fp32."""
    return case.x.float() @ weights[0].float().t()


def test_sums_are_the_same_bits_each_time(make_case, device, dtype):
    case = make_case((5, 150), (90, 30), dtype)
    first = run(case, device)
    assert all(torch.equal(run(case, device), first) for _ in range(2))


def test_a_token_gives_the_same_bits_among_others(make_case, device, dtype):
    case = make_case((8, 150), (90,), dtype)
    together = run(case, device)
    case.x = case.x[5:7]
    assert torch.equal(run(case, device), together[5:7])


@pytest.mark.parametrize(
    ("rows", "dtype", "input_major", "served"),
    [
        (2, torch.bfloat16, True, True),
        (16, torch.float16, True, True),
        (17, torch.float16, True, False),
        (0, torch.float16, True, False),
        (2, torch.float32, True, False),
        (2, torch.float16, False, False),
    ],
    ids=str,
)
def test_few_tokens_of_16_bits_and_input_major_weights_are_served(
    make_case, error, device, rows, dtype, input_major, served
):
    case = make_case((rows, 12), (8, 4), dtype, input_major=input_major)
    weights = [w.to(device) if not input_major else w.t().to(device).t() for w in case.weights]
    x, thresholds = case.x.to(device), [t.to(device) for t in case.thresholds]
    assert supports(x, weights) is served
    with noting_served() as noted:
        partial = masked_gemm.masked_gemm(x, weights, thresholds, 2)
    assert [each.implementation for each in noted] == ["masked_gemm" if served else "masked_gemm_reference"]
    assert partial.shape == (2, rows, 12)
    assert not rows or error(partial.sum(0).cpu(), case.exact()) < 2e-6


def test_weight_of_another_dtype_is_not_served(make_case, device):
    case = make_case((2, 12), (8,), torch.float16)
    assert not supports(case.x.to(device), [case.weights[0].to(device).float()])


@pytest.mark.parametrize(("channels", "sizes"), [(4096, (4096,)), (4096, (14336, 14336)), (16, (5,)), (300, (70000,))])
def test_every_shape_has_tiles(channels, sizes, device):
    config = masked_gemm_config(torch.device(device), channels, sizes)
    assert 1 <= config.splits <= max(1, channels // config.rows)
    assert 2 * config.rows * config.columns * config.stages <= 98304  # two programs share a multiprocessor's memory


@pytest.mark.parametrize("tokens", [2, 8])
def test_op_passes_opcheck(make_case, device, dtype, tokens):
    case = make_case((tokens, 40), (5, 20), dtype)
    weights = [weight.t().to(device).t() for weight in case.weights]
    arguments = (case.x.to(device), weights, [t.to(device) for t in case.thresholds], 2)
    torch.library.opcheck(masked_gemm_op, arguments, test_utils=("test_schema", "test_faketensor"))

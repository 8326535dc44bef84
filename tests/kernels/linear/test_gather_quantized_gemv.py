"""Products with the listed rows of quantised weights only, against fp64 of what the weights stand for."""

import math

import pytest
import torch

from was_fx.kernels.linear import gather_quantized_gemv
from was_fx.kernels.linear.gather_quantized_gemv import gather_quantized_gemv_op, supports
from was_fx.kernels.ops import compact
from was_fx.kernels.parts.gemv_config import GemvConfig
from was_fx.kernels.parts.served import noting_served
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import QuantizedRows, pack_int4, pack_int8

pytestmark = pytest.mark.usefixtures("loops")

SMALL = GemvConfig(rows=32, columns=64, splits=3, warps=4)
FORMATS = pytest.mark.parametrize("group", [None, 32, 128], ids=["int8", "int4-32", "int4-128"])


def quantize(case, group):
    """Rows of each weight of a `Case`; int8 for no group."""
    weights = [weight.float() for weight in case.weights]
    return [quantize_int4("weight", w, group) if group else quantize_int8(w) for w in weights]


def arguments(x, rows, thresholds, device):
    """What the op takes before the splits."""
    x, thresholds = x.to(device), [threshold.to(device) for threshold in thresholds]
    index, count = compact.compact(x, thresholds)
    codes, scales = ([getattr(each, name).to(device) for each in rows] for name in ("codes", "scales"))
    groups = [each.groups.to(device) for each in rows if each.groups is not None]
    return x, index, count, codes, scales, groups, thresholds


def run(case, rows, device, splits=2, config=SMALL):
    """y [M, ΣN] in fp32, its parts added."""
    given = arguments(case.x, rows, case.thresholds, device)
    assert supports(given[0], *given[3:6])
    partial = gather_quantized_gemv.gather_quantized_gemv(*given, splits, config)
    reference = gather_quantized_gemv.reference(*given, splits)
    assert (partial.shape, partial.dtype) == (reference.shape, torch.float32)
    finite = reference.isfinite()  # an infinite input times int4 makes NaN in one and inf in the other
    assert torch.equal(partial.isfinite(), finite)
    tolerance = max(1e-4, 10 * rounding(case.x, rows, device))
    torch.testing.assert_close(partial[finite], reference[finite], rtol=1e-4, atol=tolerance)
    return partial.sum(0).cpu().view(*case.x.shape[:-1], -1)


def rounding(x, rows, device):
    """Largest error relative to the largest |y|: several tokens multiply int4 weights that are rounded to x's dtype."""
    rounded = device == "cuda" and rows[0].groups is not None and x.numel() > x.shape[-1] and x.dtype != torch.float32
    return 4e-3 if rounded else 2e-5


def exact(case, rows):
    """y in fp64 of the numbers that the rows stand for."""
    parts = [
        case.x.double().masked_fill(case.x.float().abs() <= threshold, 0) @ each.dequantize(torch.float64)
        for each, threshold in zip(rows, case.thresholds, strict=True)
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (5, 1), (7, 11), (64, 48), (333, 129), (2100, 40)], ids=str)
def test_product_with_int8_is_accurate(make_case, error, device, dtype, k, n):
    case = make_case((1, k), (n,), dtype)
    rows = quantize(case, None)
    assert error(run(case, rows, device), exact(case, rows)) < 5e-5


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("k", "n"), [(1, 128), (7, 384), (1100, 128)], ids=str)
def test_product_with_int4_is_accurate(make_case, error, device, dtype, group, k, n):
    case = make_case((1, k), (n,), dtype)
    rows = quantize(case, group)
    assert error(run(case, rows, device), exact(case, rows)) < 5e-5


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("group", "outputs"),
    [(None, (8, 4, 4)), (None, (1, 1, 1, 1)), (None, (33, 31, 64, 7)), (32, (32, 96)), (64, (64, 192, 64, 128))],
    ids=str,
)
def test_siblings_have_lists_and_weights_of_their_own(make_case, error, device, dtype, tokens, group, outputs):
    case = make_case((tokens, 50), outputs, dtype)
    rows = quantize(case, group)
    assert error(run(case, rows, device), exact(case, rows)) < rounding(case.x, rows, device)


@FORMATS
@pytest.mark.parametrize(("tokens", "k"), [(2, 1), (2, 37), (5, 37), (8, 1100)])
def test_each_token_drops_its_own_channels(make_case, error, device, dtype, group, tokens, k):
    case = make_case((tokens, k), (128, 256), dtype, threshold=0.1 if k == 1 else 1.2)
    rows = quantize(case, group)
    assert error(run(case, rows, device), exact(case, rows)) < rounding(case.x, rows, device)


@FORMATS
@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize("k", [3, 100])
def test_any_number_of_splits_gives_the_same_sum(make_case, error, device, group, k, splits):
    case = make_case((1, k), (128,))
    rows = quantize(case, group)
    assert error(run(case, rows, device, splits), exact(case, rows)) < 5e-5


@FORMATS
@pytest.mark.parametrize(("rows", "columns", "warps"), [(16, 16, 4), (64, 512, 2), (2, 64, 8), (128, 32, 1)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_any_tile_gives_the_same_sum(make_case, error, device, group, rows, columns, warps, tokens):
    case = make_case((tokens, 150), (128, 256))
    config = GemvConfig(rows=rows, columns=columns, splits=2, warps=warps)
    weights = quantize(case, group)
    assert error(run(case, weights, device, 2, config), exact(case, weights)) < 5e-5


@pytest.mark.parametrize("tokens", [1, 2])
def test_every_int8_code_counts(make_case, device, tokens):
    case = make_case((tokens, 1), (256,), threshold=0)
    codes = torch.arange(-128, 128, dtype=torch.int8)[None]
    rows = [QuantizedRows(pack_int8(codes), torch.ones(256), None)]
    torch.testing.assert_close(run(case, rows, device), case.x @ codes.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 2])
def test_every_int4_code_step_and_zero_counts(make_case, error, device, tokens):
    case = make_case((tokens, 1), (256 * 32,), threshold=0)
    codes = pack_int4(torch.arange(256 * 32)[None] * 7 // 5 % 16)
    pairs = torch.stack((torch.arange(256).flip(0), torch.arange(256)), 1).to(torch.uint8)[None]
    rows = [QuantizedRows(codes, torch.tensor([0.003]), pairs)]
    config = GemvConfig(rows=16, columns=512, splits=1, warps=4)
    assert error(run(case, rows, device, 1, config), exact(case, rows)) < 1e-6


@FORMATS
@pytest.mark.parametrize("tokens", [1, 4])
def test_nothing_kept_gives_zero(make_case, device, group, tokens):
    case = make_case((tokens, 100), (128, 256))
    case.thresholds = [torch.full((100,), math.inf) for _ in case.thresholds]
    assert run(case, quantize(case, group), device).eq(0).all()


@FORMATS
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_kept_nonfinite_input_spoils_its_own_token_only(make_case, device, group, tokens, bad):
    case = make_case((tokens, 40), (128,))
    case.x[-1, 7] = bad
    y = run(case, quantize(case, group), device)
    assert torch.isfinite(y[:-1]).all()
    assert not torch.isfinite(y[-1]).any()


@FORMATS
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("k", [1, 150])
def test_without_a_list_every_channel_of_one_token_is_kept(make_case, error, device, dtype, group, k, splits):
    case = make_case((1, k), (128, 256), dtype)
    case.thresholds = [torch.full((k,), -1.0) for _ in case.thresholds]
    rows = quantize(case, group)
    x, _, _, *stored, _ = arguments(case.x, rows, case.thresholds, device)
    partial = gather_quantized_gemv.gather_quantized_gemv(x, None, None, *stored, [], splits, SMALL)
    assert torch.equal(partial.sum(0).cpu(), run(case, rows, device, splits))
    reference = gather_quantized_gemv.reference(x, None, None, *stored, [], splits)
    assert error(reference.sum(0).cpu(), exact(case, rows)) < rounding(case.x, rows, device)


@FORMATS
def test_weights_of_dropped_channels_are_not_read(make_case, device, group):
    case = make_case((1, 40), (128,))
    dropped = case.x[0].abs() <= case.thresholds[0]
    (rows,) = quantize(case, group)
    clean = run(case, [rows], device)
    rows.codes[dropped] = 77
    if group:
        rows.scales[dropped], rows.groups[dropped] = math.nan, 200
    assert torch.equal(run(case, [rows], device), clean)


@FORMATS
def test_sums_are_the_same_bits_each_time(make_case, device, dtype, group):
    case = make_case((1, 150), (256, 128), dtype)
    rows = quantize(case, group)
    first = run(case, rows, device)
    assert all(torch.equal(run(case, rows, device), first) for _ in range(2))


@FORMATS
@pytest.mark.parametrize(
    ("tokens", "dtype", "served"),
    [(1, torch.float32, True), (8, torch.float16, True), (9, torch.float32, False), (0, torch.float32, False),
     (1, torch.float64, False)],
    ids=str,
)  # fmt: skip
def test_few_tokens_are_served(make_case, device, group, tokens, dtype, served):
    case = make_case((tokens, 12), (128, 256), dtype)
    given = arguments(case.x, quantize(case, group), case.thresholds, device)
    assert supports(given[0], *given[3:6]) is served


SPOILS = {
    "output-major": lambda codes: codes.t().contiguous().t(),
    "cut": lambda codes: codes[:, :24].contiguous(),
    "wide": lambda codes: codes.int(),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_other_codes_are_not_served(make_case, device, spoil):
    case = make_case((1, 12), (64, 32))
    x, _, _, codes, scales, groups, _ = arguments(case.x, quantize(case, None), case.thresholds, device)
    assert supports(x, codes, scales, groups)
    assert not supports(x, [SPOILS[spoil](codes[0]), codes[1]], scales, groups)


def test_groups_of_two_sizes_are_left_to_the_reference(make_case, error, device):
    case = make_case((1, 12), (64, 64))
    rows = [quantize_int4("weight", weight, group) for weight, group in zip(case.weights, (32, 64), strict=True)]
    given = arguments(case.x, rows, case.thresholds, device)
    assert not supports(given[0], *given[3:6])
    with noting_served() as noted:
        partial = gather_quantized_gemv.gather_quantized_gemv(*given, 2)
    assert error(partial.sum(0).cpu(), exact(case, rows)) < 2e-6
    assert [(each.implementation, len(each.weights)) for each in noted] == [("gather_quantized_gemv_reference", 2)]


@FORMATS
@pytest.mark.parametrize("tokens", [1, 2])
def test_op_passes_opcheck(make_case, device, group, tokens):
    case = make_case((tokens, 40), (128, 256))
    given = arguments(case.x, quantize(case, group), case.thresholds, device)
    torch.library.opcheck(gather_quantized_gemv_op, (*given, 2), test_utils=("test_schema", "test_faketensor"))

"""Weights quantised by themselves."""

import pytest
import torch

from was_fx.kernels.quantized import fit
from was_fx.kernels.quantized.fit import check_finite, fit_int4, quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import check_rows, int4_values

BOTH = pytest.mark.parametrize("quantize", [lambda _, w: quantize_int8(w), quantize_int4], ids=["int8", "int4"])


def weight(outputs=128, channels=48, dtype=torch.float32) -> torch.Tensor:
    """W [N, K] with heavy tails, for which the best range is not that of its extremes."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(outputs, channels, generator=generator)
    return (w * (1 + w.abs())).to(dtype)


def error(rows, w) -> float:
    """Squared error, relative."""
    return float((rows.dequantize(torch.float32).t() - w.float()).square().sum() / w.float().square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_within_half_a_level(dtype):
    w = weight(outputs=40, dtype=dtype)
    rows = quantize_int8(w)
    check_rows("w", rows, (40, 48))
    off = (rows.dequantize(torch.float32).t() - w.float()).abs()
    assert (off <= rows.scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_fitted_better_than_the_whole_range_is_divided(monkeypatch, group, dtype):
    w = weight(dtype=dtype)
    rows = quantize_int4("w", w, group)
    check_rows("w", rows, (128, 48))
    monkeypatch.setattr(fit, "SHRINK", (1.0,))
    monkeypatch.setattr(fit, "_ROUNDS", 0)
    assert error(rows, w) < 0.9 * error(quantize_int4("w", w, group), w)


def test_smaller_groups_fit_better():
    errors = [error(quantize_int4("w", weight(), group), weight()) for group in (32, 64, 128)]
    assert errors == sorted(errors)
    assert errors[0] < 0.01


@BOTH
def test_pieces_do_not_change_the_result(monkeypatch, quantize):
    whole = quantize("w", weight())
    monkeypatch.setattr(fit, "_PIECE", 128 * 5)
    pieces = quantize("w", weight())
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3], ids=["zeros", "one positive value", "one negative value"])
@BOTH
def test_rows_of_one_value_come_back(quantize, value):
    w = torch.full((32, 4), value)
    rows = quantize("w", w)
    check_rows("w", rows)
    torch.testing.assert_close(rows.dequantize(torch.float32).t(), w, rtol=0.005, atol=1e-30)


def test_a_group_much_smaller_than_its_row_s_largest_keeps_its_signs_and_size():
    w = weight(64, 1)
    w[32:] *= 0.02
    small = quantize_int4("w", w).dequantize(torch.float32)[0, 32:]
    assert (small - w[32:, 0]).square().sum() < 0.05 * w[32:, 0].square().sum()


def test_levels_scales_and_groups_are_what_int4_values_reads():
    w = weight().t().contiguous()
    q, scales, groups = fit_int4(w, 32)
    assert (q.dtype, scales.dtype, groups.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert torch.equal(int4_values(q, scales, groups), quantize_int4("w", w.t()).dequantize(torch.float32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    w = weight()
    check_finite("mlp.up_proj", w)
    w[3, 5] = bad
    with pytest.raises(ValueError, match=r"mlp\.up_proj: the weight holds NaN or inf"):
        check_finite("mlp.up_proj", w)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="w has 96 outputs"):
        quantize_int4("w", weight(outputs=96), 64)

"""Weights quantised for the inputs that they meet."""

import pytest
import torch

from was_fx.kernels.quantized import error_feedback
from was_fx.kernels.quantized.error_feedback import quantize_with_hessian
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import check_rows

FORMATS = pytest.mark.parametrize(("format", "group"), [("int8", 32), ("int4", 32), ("int4", 64)])


def case(outputs=64, channels=96) -> tuple[torch.Tensor, torch.Tensor]:
    """W [N, K], and H [K, K] of inputs that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, channels // 4, generator=generator) @ torch.randn(channels // 4, channels, generator=generator)
    x = (x + 0.3 * torch.randn(500, channels, generator=generator)) * torch.linspace(0.1, 3, channels)
    return torch.randn(outputs, channels, generator=generator), x.t() @ x / len(x)


def by_itself(w, format, group):
    return quantize_int8(w) if format == "int8" else quantize_int4("w", w, group)


def loss(rows, w, hessian) -> float:
    """tr (W − Ŵ) H (W − Ŵ)ᵀ."""
    off = rows.dequantize(torch.float32).t() - w.float()
    return float((off @ hessian * off).sum())


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_closer_than_those_of_a_weight_quantised_by_itself(format, group, dtype):
    w, hessian = case()
    w = w.to(dtype)
    rows = quantize_with_hessian("w", w, hessian, format, group)
    check_rows("w", rows, (64, 96))
    assert rows.format == format
    assert loss(rows, w, hessian) < 0.4 * loss(by_itself(w, format, group), w, hessian)


@FORMATS
def test_independent_inputs_leave_nothing_to_make_up_for(format, group):
    w, _ = case()
    rows, alone = quantize_with_hessian("w", w, torch.eye(96), format, group), by_itself(w, format, group)
    assert torch.equal(rows.codes, alone.codes)
    torch.testing.assert_close(rows.scales, alone.scales)


@FORMATS
def test_blocks_give_what_one_block_does(monkeypatch, format, group):
    w, hessian = case(channels=80)
    whole = quantize_with_hessian("w", w, hessian, format, group)
    monkeypatch.setattr(error_feedback, "_BLOCK", error_feedback._FITTED)
    blocks = quantize_with_hessian("w", w, hessian, format, group)
    assert loss(blocks, w, hessian) == pytest.approx(loss(whole, w, hessian), rel=0.02)
    assert (whole.codes == blocks.codes).float().mean() > 0.99  # but for rounding


def test_the_factor_is_that_of_the_damped_inverse():
    _, hessian = case()
    u = error_feedback._factor(hessian, 0.1)
    damped = hessian.double() + 0.1 * hessian.double().diagonal().mean() * torch.eye(96)
    assert not u.tril(-1).any()
    torch.testing.assert_close((u.t() @ u).double() @ damped, torch.eye(96).double(), rtol=0, atol=1e-4)


@FORMATS
@pytest.mark.parametrize(
    "hessian",
    [
        pytest.param(torch.zeros(96, 96), id="no input ever"),
        pytest.param(torch.ones(96, 96), id="one direction"),
        pytest.param(torch.eye(96) * (torch.arange(96) % 2), id="dead channels"),
        pytest.param(torch.eye(96) - 1e-3 * torch.ones(96, 96) * 20, id="not positive"),
    ],
)
def test_singular_hessians_are_damped_until_they_are_not(format, group, hessian):
    w, _ = case()
    rows = quantize_with_hessian("w", w, hessian, format, group, damping=0.0)
    check_rows("w", rows, (64, 96))
    off = rows.dequantize(torch.float32).t() - w
    assert off.square().sum() < 0.1 * w.square().sum()


def test_the_arguments_are_not_changed():
    w, hessian = case()
    before = w.clone(), hessian.clone()
    quantize_with_hessian("w", w, hessian)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


def poisoned(tensor, value):
    tensor[1, 1] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": poisoned(case()[1], torch.nan)}, "layer.w: the Hessian holds NaN or inf"),
        ({"hessian": poisoned(case()[1], torch.inf)}, "layer.w: the Hessian holds NaN or inf"),
        ({"hessian": torch.eye(64)}, r"layer.w: the Hessian is \[64, 64\]; expected \[96, 96\]"),
        ({"group": 128}, "layer.w has 64 outputs, which groups of 128 don't divide"),
        ({"format": "int3"}, "the format is 'int3'; expected one of int8, int4"),
    ],
)
def test_what_cannot_be_quantised_is_refused(change, message):
    w, hessian = case()
    with pytest.raises(ValueError, match=message):
        quantize_with_hessian(**{"name": "layer.w", "weight": w, "hessian": hessian, **change})

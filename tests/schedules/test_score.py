import math

import pytest
import torch

from was_fx.schedules import score as score_module
from was_fx.schedules.score import Score, channel_norms, channel_thresholds, to_fp32


@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [
        ("was", Score(1.0, 1), "|x|·‖W‖₁^1"),
        ("teal", Score(0.0, 1), "|x|"),
        ("wina", Score(1.0, 2), "|x|·‖W‖₂^1"),
    ],
)
def test_published_scores(name, expected, text):
    assert Score.named(name) == expected
    assert str(expected) == text


def test_score_holds_what_a_file_holds():
    assert Score(0.3).exponent == to_fp32(0.3) != 0.3
    assert str(Score(0.3, 2)) == "|x|·‖W‖₂^0.3"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score(-0.5), "exponent must be finite and at least 0, found -0.5"),
        (lambda: Score(math.nan), "found nan"),
        (lambda: Score(math.inf), "found inf"),
        (lambda: Score(1e39), "found 1e\\+39"),
        (lambda: Score(norm=3), "p = 1 or p = 2, found 3"),
        (lambda: Score(norm=True), "found True"),
        (lambda: Score.named("magnitude"), "expected one of was, teal, wina"),
        (lambda: channel_norms(torch.ones(2, 3), 0), "p = 1 or p = 2, found 0"),
        (lambda: channel_thresholds(math.nan, torch.ones(3), 1.0), "threshold must be finite"),
        (lambda: channel_thresholds(-1.0, torch.ones(3), 1.0), "found -1.0"),
        (lambda: channel_thresholds(1.0, torch.ones(3), math.inf), "exponent must be finite"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["row-major", "column-major", "slice of a larger one"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 131), (300, 2)])
def test_norms_match_plain_fp32(norm, dtype, layout, shape, monkeypatch):
    monkeypatch.setattr(score_module, "_BLOCK_ELEMENTS", 4000)  # several blocks
    outputs, inputs = shape
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    if layout == "column-major":
        weight = weight.t().contiguous().t()
    elif layout == "slice of a larger one":
        weight = torch.cat([weight, weight + 1, weight], dim=1)[:, inputs : 2 * inputs]
    norms = channel_norms(weight, norm)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.linalg.vector_norm(weight.float(), norm, dim=0))


def test_norms_carry_no_gradient():
    assert not channel_norms(torch.nn.Linear(4, 3).weight, 1).requires_grad


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (0.0, [2.0, 2.0, 2.0, 2.0]),
        (0.5, [math.inf, 2.0, 1.0, 4.0]),
        (1.0, [math.inf, 2.0, 0.5, 8.0]),
    ],
)
def test_channel_thresholds(exponent, expected):
    thresholds = channel_thresholds(2.0, torch.tensor([0.0, 1.0, 4.0, 0.25]), exponent)
    assert thresholds.dtype == torch.float32
    assert thresholds.tolist() == expected


def test_zero_threshold_keeps_all_but_zero_columns():
    assert channel_thresholds(0.0, torch.tensor([0.0, 3.0]), 1.0).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", [1, 2])
def test_channel_thresholds_drop_what_scores_drop(exponent, norm):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 40, generator=generator), torch.randn(64, 40, generator=generator)
    weight[:, 3] = 0
    x[:, 5] = 0
    norms = channel_norms(weight, norm)
    scores = x.abs() * norms**exponent
    threshold = scores.median().item() * 1.001  # no score lies within a rounding error of it
    dropped = x.abs() <= channel_thresholds(threshold, norms, exponent)
    expected = scores <= threshold
    expected[:, 3] |= exponent > 0
    assert torch.equal(dropped, expected)
    assert bool(dropped[:, 5].all())

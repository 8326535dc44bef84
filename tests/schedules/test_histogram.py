import math

import pytest
import torch

from was_fx.schedules.histogram import ScoreHistogram

LEVELS = torch.arange(1000, dtype=torch.float64) / 1000


def draw(name: str, count: int = 200_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    return {
        "half-normal": normal.abs(),
        "log-normal": (3 * normal).exp(),
        "uniform": torch.rand(count, generator=generator),
        "tiny": normal.abs() * 1e-20,
        "huge": normal.abs() * 1e30,
        "two scales": torch.where(normal > 1, normal * 1e6, normal.abs()),
    }[name]


def histogram_of(scores: torch.Tensor) -> ScoreHistogram:
    histogram = ScoreHistogram()
    histogram.add(scores)
    return histogram


@pytest.mark.parametrize("name", ["half-normal", "log-normal", "uniform", "tiny", "huge", "two scales"])
def test_quantiles_match_sorting(name):
    scores = draw(name)
    quantiles = histogram_of(scores).quantiles(LEVELS)
    assert quantiles.dtype == torch.float32
    exact = scores.sort().values[(LEVELS * len(scores)).ceil().long().sub(1).clamp(min=0)]
    torch.testing.assert_close(quantiles[1:], exact[1:], rtol=0.01, atol=0)
    realised = torch.searchsorted(scores.sort().values, quantiles, right=True) / len(scores)
    assert (realised - LEVELS).abs().max() <= 0.002
    assert bool((quantiles.diff() >= 0).all())


def test_quantiles_match_torch_quantile():
    scores = draw("half-normal")
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(
        histogram_of(scores).quantiles(levels), torch.quantile(scores, levels), rtol=0.01, atol=0
    )


def test_bf16_scores_are_cut_at_the_nearest_share():
    scores = draw("half-normal").bfloat16()
    quantiles = histogram_of(scores).quantiles(LEVELS)
    realised = torch.searchsorted(scores.float().sort().values, quantiles, right=True) / len(scores)
    assert (realised - LEVELS).abs().max() <= 0.002
    assert (realised - LEVELS).mean().abs() <= 1e-4


@pytest.mark.parametrize(("level", "positive"), [(0.0, False), (0.3, False), (0.6, False), (0.601, True), (0.9, True)])
def test_levels_up_to_the_share_of_zeros_give_zero(level, positive):
    scores = torch.cat([torch.zeros(500), -torch.zeros(100), torch.full((400,), 0.5)])
    threshold = histogram_of(scores).quantiles([level]).item()
    assert (threshold > 0) == positive


def test_all_zeros_give_zero():
    assert histogram_of(torch.zeros(10)).quantiles([0.0, 0.5, 1.0]).tolist() == [0, 0, 0]


def test_last_level_drops_everything():
    scores = draw("half-normal", 1000)
    assert histogram_of(scores).quantiles([1.0]).item() >= scores.max()


def test_largest_finite_score_is_no_infinity():
    largest = torch.tensor([torch.finfo(torch.bfloat16).max])
    assert math.isfinite(histogram_of(largest).quantiles([1.0]).item())


def test_parts_add_up():
    scores = draw("log-normal", 3000)
    whole, parts = histogram_of(scores), ScoreHistogram()
    parts.add(scores[:1000].view(10, 100))
    parts.add(scores[:0])
    parts.add(scores[1000:])
    assert parts.total == whole.total == 3000
    assert torch.equal(parts.quantiles(LEVELS), whole.quantiles(LEVELS))


def test_scores_from_inside_and_outside_inference_mode_add_up():
    with torch.inference_mode():
        histogram = histogram_of(torch.ones(3))
    histogram.add(torch.ones(2))
    assert histogram.total == 5
    assert histogram.quantiles([1.0]).item() == pytest.approx(1.0, rel=0.01)

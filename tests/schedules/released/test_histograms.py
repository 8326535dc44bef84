"""Thresholds of released histograms."""

import numpy as np
import pytest
import torch

from was_fx.schedules.released.histograms import ReleasedHistogram, read_histogram


def released_quantile(counts: list[float], centers: list[float], share: float) -> float:
    """The rule of the released code, spelled out: the first bin that the running count reaches, and between its
    middle and the one before linear in the count."""
    target = share * sum(counts)
    before = 0.0
    for index, count in enumerate(counts):
        if before + count >= target:
            if index == 0:
                return centers[0]
            return centers[index - 1] + (target - before) / count * (centers[index] - centers[index - 1])
        before += count
    return centers[-1]


@pytest.fixture(scope="module")
def signed() -> ReleasedHistogram:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (200,), generator=generator).double().numpy()
    counts[20:30] = 0
    return ReleasedHistogram(counts, np.linspace(-3.0, 3.5, 200))


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.5, 0.85, 0.975, 0.9999])
def test_a_signed_histogram_gives_the_upper_half_quantile(signed, sparsity):
    expected = released_quantile(signed.counts.tolist(), signed.centers.tolist(), 0.5 + sparsity / 2)
    assert signed.threshold(sparsity) == pytest.approx(max(expected, 0.0), rel=1e-12)


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.999])
def test_a_histogram_of_magnitudes_gives_the_quantile_itself(signed, sparsity):
    magnitudes = ReleasedHistogram(signed.counts, signed.centers + 3.0)
    expected = released_quantile(signed.counts.tolist(), (signed.centers + 3.0).tolist(), sparsity)
    assert magnitudes.threshold(sparsity) == pytest.approx(expected, rel=1e-12)


def test_no_sparsity_is_a_threshold_of_zero(signed):
    assert signed.threshold(0.0) == 0.0


@pytest.mark.parametrize("sparsity", [1.0, 1.2, 6.4])
def test_more_than_everything_is_the_middle_of_the_last_bin(signed, sparsity):
    assert signed.threshold(sparsity) == 3.5


def test_a_median_off_zero_gives_no_negative_threshold():
    histogram = ReleasedHistogram(np.array([10.0, 10.0, 1.0]), np.array([-2.0, -1.0, 1.0]))
    assert histogram.threshold(0.01) == 0.0


def test_bins_in_any_order_are_read_in_theirs():
    content = {"q": torch.tensor([3.0, 1.0, 2.0]), "q_centers": torch.tensor([2.0, 0.0, 1.0])}
    found = read_histogram(content, "q")
    assert (found.counts.tolist(), found.centers.tolist()) == ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert (found.total, found.signed) == (6.0, False)


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "'q' is missing"),
        ({"q": ONES}, "'q_centers' is missing"),
        ({"q": [1, 2, 3], "q_centers": ONES}, "'q' is a list"),
        ({"q": torch.ones(3, 3), "q_centers": ONES}, r"'q' is a tensor \[3, 3\]"),
        ({"q": ONES, "q_centers": ONES * 1j}, r"'q_centers' is a tensor \[3\] complex64"),
        ({"q": ONES.to_sparse(), "q_centers": ONES}, r"'q' is a tensor \[3\] float32"),
        ({"q": torch.ones(4), "q_centers": ONES}, "'q' has 4 bins, 'q_centers' has 3"),
        ({"q": ONES, "q_centers": ONES * torch.nan}, "NaN or infinite"),
        ({"q": -ONES, "q_centers": ONES}, "negative counts"),
        ({"q": ONES * 0, "q_centers": ONES}, "none at all"),
    ],
)
def test_refusals(content, message):
    with pytest.raises(ValueError, match=message):
        read_histogram(content, "q")

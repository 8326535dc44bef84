"""Channel thresholds of a weight, remembered for each weight and version of it."""

import gc
import math

import pytest
import torch

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.kernels.ops import channel_threshold as home
from was_fx.kernels.ops.channel_threshold import channel_threshold_op, reference
from was_fx.schedules.score import channel_norms, channel_thresholds


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is remembered; of each time that thresholds were computed since, the shape of the weight."""
    computed, inner = [], home.reference
    monkeypatch.setattr(home, "_known", {})
    monkeypatch.setattr(home, "reference", lambda *each: computed.append(each[0].shape) or inner(*each))
    return computed


def weight_of(shape=(7, 5), dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meaning(weight, threshold, exponent, norm):
    return channel_thresholds(threshold, channel_norms(weight, norm), exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_thresholds_are_those_of_the_schedule(dtype, norm, exponent, threshold):
    weight = weight_of((33, 17), dtype)
    found = channel_threshold_op(weight, threshold, exponent, norm, False)
    assert (found.dtype, found.shape) == (torch.float32, (17,))
    torch.testing.assert_close(found, meaning(weight, threshold, exponent, norm))


@pytest.mark.parametrize("norm", [1, 2])
def test_channels_without_weight_are_never_kept(norm):
    weight = weight_of()
    weight[:, 2] = 0
    assert channel_threshold_op(weight, 0.5, 1.0, norm, False)[2] == math.inf
    assert channel_threshold_op(weight, 0.0, 1.0, norm, False)[2] == math.inf
    assert channel_threshold_op(weight, 0.5, 0.0, norm, False).tolist() == [0.5] * 5


@pytest.mark.parametrize("strides", ["rows", "columns", "every second"])
def test_strides_do_not_matter(strides):
    weight = weight_of()
    laid_out = {
        "rows": weight,
        "columns": weight.t().contiguous().t(),
        "every second": torch.stack([weight, weight + 1], dim=-1)[..., 0],
    }[strides]
    torch.testing.assert_close(channel_threshold_op(laid_out, 0.5, 1.0, 1, False), meaning(weight, 0.5, 1.0, 1))


def test_weights_that_are_stored_the_other_way_round():
    weight = weight_of()
    found = channel_threshold_op(weight.t().contiguous(), 0.5, 1.0, 2, True)
    torch.testing.assert_close(found, meaning(weight, 0.5, 1.0, 2))


def test_thresholds_are_computed_once_for_each_weight_and_its_numbers(forgotten):
    weight, other = weight_of(), weight_of(seed=1)
    for _ in range(3):
        for arguments in ((0.5, 1.0, 1, False), (0.6, 1.0, 1, False), (0.5, 2.0, 1, False), (0.5, 1.0, 2, False)):
            for each in (weight, other):
                torch.testing.assert_close(channel_threshold_op(each, *arguments), meaning(each, *arguments[:3]))
    assert len(forgotten) == 8


def test_result_may_be_written_to(forgotten):
    weight = weight_of()
    expected = meaning(weight, 0.5, 1.0, 1)
    for _ in range(3):
        found = channel_threshold_op(weight, 0.5, 1.0, 1, False)
        torch.testing.assert_close(found, expected)
        found.fill_(math.nan)
    assert len(forgotten) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight[1:].zero_(),
        lambda weight: weight.view(-1).copy_(torch.ones(35)),
        lambda weight: weight.detach().neg_().add_(1),
        lambda weight: setattr(weight, "data", torch.ones(7, 5)),
        lambda weight: setattr(weight, "data", torch.ones(7, 4)),
        lambda weight: setattr(weight, "data", weight.data.double()),
    ],
    ids=["in place", "a part", "through a view", "through detach", "replaced", "another shape", "another dtype"],
)
@torch.no_grad()
def test_changed_weight_is_looked_at_again(change, forgotten):
    weight = torch.nn.Parameter(weight_of())
    channel_threshold_op(weight, 0.5, 1.0, 1, False)
    change(weight)
    for _ in range(2):
        torch.testing.assert_close(channel_threshold_op(weight, 0.5, 1.0, 1, False), meaning(weight, 0.5, 1.0, 1))
    assert len(forgotten) == 2


def test_parts_of_one_storage_are_told_apart():
    whole = weight_of((14, 5))
    square = weight_of((5, 5))
    for weight in (whole[:7], whole[7:], whole[:7], square, square.t()):
        torch.testing.assert_close(channel_threshold_op(weight, 0.5, 1.0, 1, False), meaning(weight, 0.5, 1.0, 1))


def test_memory_of_a_weight_that_is_gone_is_another_weights(forgotten):
    """Storages of one size take each other's place in memory."""
    for seed in range(50):
        weight = weight_of((64, 64), seed=seed)
        torch.testing.assert_close(channel_threshold_op(weight, 0.5, 1.0, 1, False), meaning(weight, 0.5, 1.0, 1))
        del weight
        gc.collect()
    assert len(forgotten) == 50


def test_results_of_weights_that_are_gone_are_dropped_and_those_of_living_ones_stay(monkeypatch, forgotten):
    monkeypatch.setattr(home, "_MANY", 6)
    kept = [weight_of(seed=seed) for seed in range(8)]
    for weight in kept:
        channel_threshold_op(weight, 0.5, 1.0, 1, False)
    for seed in range(100, 120):
        channel_threshold_op(weight_of(seed=seed), 0.5, 1.0, 1, False)
    assert len(home._known) <= len(kept) + 1
    assert len(forgotten) == len(kept) + 20
    for weight in kept:
        channel_threshold_op(weight, 0.5, 1.0, 1, False)
    assert len(forgotten) == len(kept) + 20


def test_weights_of_inference_mode_have_no_version_and_are_not_remembered():
    with torch.inference_mode():
        weight = weight_of()
        for _ in range(2):
            expected = meaning(weight, 0.5, 1.0, 1)
            torch.testing.assert_close(channel_threshold_op(weight, 0.5, 1.0, 1, False), expected)
            weight.mul_(2)


def test_weight_that_requires_grad_gives_thresholds_that_do_not():
    weight = torch.nn.Parameter(weight_of())
    assert not channel_threshold_op(weight, 0.5, 1.0, 1, False).requires_grad
    assert not reference(weight, 0.5, 1.0, 1).requires_grad


def test_gradients_pass_by_without_a_warning():
    weight = torch.nn.Parameter(weight_of())
    limits = channel_threshold_op(weight, 0.5, 1.0, 1, False)
    y = sparse_linear(torch.ones(2, 5), weight, None, limits, None)
    y.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_passes_opcheck(dtype, input_major, requires_grad):
    weight = weight_of(dtype=dtype).requires_grad_(requires_grad)
    torch.library.opcheck(channel_threshold_op, (weight, 0.5, 1.0, 1, input_major))

"""Fisher weights after a correction by what was measured."""

import dataclasses

import pytest
import torch

from was_fx.schedules.search.fisher_correction import DroppedCosts, FisherSettings, corrected_weights

ALL_THE_WAY = {"step": 1.0, "most": 100.0}


def of(values):
    return {name: torch.tensor(each) for name, each in values.items()}


def costs(nats, variances, squares):
    return {name: DroppedCosts(nats[name], variances[name], squares[name]) for name in nats}


WEIGHTS = of({"a": [1.0, 2.0], "b": [3.0, 1.0]})
SQUARES = of({"a": [1.0, 1.0], "b": [1.0, 4.0]})
FORESEEN = {name: WEIGHTS[name] ** 2 * SQUARES[name] for name in WEIGHTS}
NO_NOISE = {name: torch.zeros(2) for name in WEIGHTS}


def test_what_is_as_foreseen_changes_nothing():
    found = corrected_weights(
        WEIGHTS, costs({name: 7 * each for name, each in FORESEEN.items()}, NO_NOISE, SQUARES), 0.5
    )
    for name, weights in WEIGHTS.items():
        torch.testing.assert_close(found[name], weights)


def test_without_noise_each_channel_counts_as_measured():
    nats = {name: each.clone() for name, each in FORESEEN.items()}
    nats["a"][0] *= 4
    typical = sum(each.sum() for each in nats.values()) / sum(each.sum() for each in FORESEEN.values())
    found = corrected_weights(WEIGHTS, costs(nats, NO_NOISE, SQUARES), **ALL_THE_WAY)
    for name in WEIGHTS:
        torch.testing.assert_close(found[name], (nats[name] / SQUARES[name] / typical).sqrt())
    half = corrected_weights(WEIGHTS, costs(nats, NO_NOISE, SQUARES), step=0.5, most=100.0)
    torch.testing.assert_close(half["a"], (found["a"] * WEIGHTS["a"]).sqrt())
    bounded = corrected_weights(WEIGHTS, costs(nats, NO_NOISE, SQUARES), step=1.0, most=1.1)
    assert float((bounded["a"][0] / WEIGHTS["a"][0]).square()) == pytest.approx(1.1)


def test_noise_changes_little():
    generator = torch.Generator().manual_seed(0)
    weights, squares = {"a": torch.ones(1000), "b": torch.ones(1000)}, {"a": torch.ones(1000), "b": torch.ones(1000)}
    truth = {"a": torch.full((1000,), 2.0), "b": torch.linspace(0.5, 1.5, 1000)}
    nats = {name: each + 3 * torch.randn(1000, generator=generator) for name, each in truth.items()}
    variances = {name: torch.full((1000,), 9.0) for name in truth}
    found = corrected_weights(weights, costs(nats, variances, squares), **ALL_THE_WAY)
    # What all channels of a Linear have in common is seen, and little of what seems to tell them apart.
    assert float(found["a"].square().mean() / found["b"].square().mean()) == pytest.approx(2.0, rel=0.2)
    assert float(found["a"].square().std() / found["a"].square().mean()) < 0.25
    assert float((found["b"].square() - truth["b"] / 1.5).std()) < float((nats["b"] - truth["b"]).std()) / 3


def test_channels_that_were_never_dropped_go_with_their_linear():
    nats, squares = of({"a": [4.0, 0.0], "b": [1.0, 1.0]}), of({"a": [1.0, 0.0], "b": [1.0, 1.0]})
    found = corrected_weights(of({"a": [1.0, 2.0], "b": [1.0, 1.0]}), costs(nats, NO_NOISE, squares), **ALL_THE_WAY)
    assert float(found["a"][1] / 2.0) == pytest.approx(float(found["a"][0]))
    none = of({"a": [4.0, 0.0], "b": [0.0, 0.0]})
    found = corrected_weights(WEIGHTS, costs(nats, NO_NOISE, none), **ALL_THE_WAY)
    torch.testing.assert_close(found["b"], WEIGHTS["b"])


@pytest.mark.parametrize("total", [0.0, -1.0, float("nan")])
def test_where_dropping_costs_nothing_nothing_changes(total):
    nats = of({"a": [total, 0.0], "b": [0.0, 0.0]})
    found = corrected_weights(WEIGHTS, costs(nats, NO_NOISE, SQUARES), 0.5)
    for name, weights in WEIGHTS.items():
        assert torch.equal(found[name], weights)


@pytest.mark.parametrize(
    "wrong",
    [
        {"corrections": -1},
        {"at": 1.0},
        {"at": -0.1},
        {"steps": (0.0,)},
        {"steps": (0.5, 1.5)},
        {"steps": ()},
        {"most": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="fisher needs"):
        dataclasses.replace(FisherSettings(), **wrong)

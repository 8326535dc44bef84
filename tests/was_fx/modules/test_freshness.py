"""Thresholds and strides follow the weights: what is looked at, when, and what is left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

import was_fx
from was_fx.modules import freshness as freshness_module
from was_fx.modules.freshness import Freshness
from was_fx.modules.linears import find_linears

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def sparse(llama, calibration):
    return was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5))


@pytest.fixture
def refreshed(monkeypatch) -> list[str]:
    """Names of the Linears whose norms were taken again."""
    found, take = [], freshness_module.take_norms

    def note(linear):
        found.append(linear.name)
        take(linear)

    monkeypatch.setattr(freshness_module, "take_norms", note)
    return found


@torch.no_grad()
def run(model, ids, **keywords):
    return model(ids, use_cache=True, **keywords)


def double(module):
    with torch.no_grad():
        module.weight.mul_(2)


def replace(module):
    module.weight = nn.Parameter(module.weight.detach() * 2)


def through_data(module):
    module.weight.data *= 2


def data_replaced(module):
    module.weight.data = module.weight.data * 2


def in_inference_mode(module):
    with torch.inference_mode():
        module.weight = nn.Parameter(module.weight * 2, requires_grad=False)


CHANGES = [double, replace, through_data, data_replaced, in_inference_mode]


def test_what_has_not_changed_is_left_alone(sparse, refreshed, tokens):
    for _ in range(2):
        run(sparse, tokens)
    assert refreshed == []


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_has_changed_is_taken_again_and_its_buffers_stay_where_they_are(sparse, refreshed, tokens, change):
    module = sparse.get_submodule(NAME)
    places = module.was_threshold.data_ptr(), module.was_norms.data_ptr()
    before = module.was_threshold.clone(), module.was_norms.clone()
    change(module)
    for _ in range(2):
        run(sparse, tokens)
    assert refreshed == [NAME]
    assert (module.was_threshold.data_ptr(), module.was_norms.data_ptr()) == places
    torch.testing.assert_close(module.was_norms, 2 * before[1])
    torch.testing.assert_close(module.was_threshold, before[0] / 2)


def test_decode_steps_look_at_nothing(sparse, refreshed, tokens):
    cache = run(sparse, tokens[:, :8]).past_key_values
    double(sparse.get_submodule(NAME))
    cache = run(sparse, tokens[:, 8:9], past_key_values=cache).past_key_values
    assert refreshed == []
    run(sparse, tokens[:, 9:12], past_key_values=cache)  # several tokens are a prompt
    assert refreshed == [NAME]


def test_the_body_alone_is_looked_at_too(sparse, refreshed, tokens):
    double(sparse.get_submodule(NAME))
    with torch.no_grad():
        sparse.model(tokens)
    assert [name.removeprefix("layers.") for name in refreshed] == ["0.mlp.up_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(sparse, refreshed, tokens, dtype):
    sparse.to(dtype)
    run(sparse, tokens)
    assert sorted(refreshed) == sorted(sparse._was_state.schedule.linears)
    module = sparse.get_submodule(NAME)
    assert module.was_threshold.dtype == module.was_norms.dtype == torch.float32
    torch.testing.assert_close(module.was_norms, module.weight.float().abs().sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("change", [replace, data_replaced])
def test_rows_of_other_strides_are_made_contiguous_again(sparse, tokens, change):
    module = sparse.get_submodule(NAME)
    change(module)
    module.weight.data = module.weight.data.contiguous()
    values = module.weight.detach().clone()
    assert not module.weight.t().is_contiguous()
    run(sparse, tokens)
    assert module.weight.t().is_contiguous()
    assert module.weight.equal(values)


def test_what_waits_on_the_meta_device_is_left_alone(sparse, refreshed, tokens):
    module = sparse.get_submodule(NAME)
    weight, threshold = module.weight, module.was_threshold.clone()
    module.weight = nn.Parameter(weight.to("meta"))
    sparse._was_state.freshness.refresh(sparse)
    module.weight = weight
    run(sparse, tokens)
    assert refreshed == []
    assert module.was_threshold.equal(threshold)


def test_numbers_that_changed_stay_when_the_weight_changes(sparse, calibration, tokens):
    other = was_fx.uniform(calibration, 0.8)
    was_fx.sparsify(sparse, other)
    module = sparse.get_submodule(NAME)
    double(module)
    run(sparse, tokens)
    expected = other.linears[NAME].channel_thresholds(module.weight.abs().sum(0))
    torch.testing.assert_close(module.was_threshold, expected)


def test_own_thresholds_of_channels_do_not_follow_the_weight(llama, calibration, tokens):
    schedule = was_fx.uniform(calibration, 0.5)
    own = torch.linspace(0, 1, 64)
    sparse = was_fx.sparsify(
        llama, schedule.replace({NAME: was_fx.LinearSchedule(0.5, 0.0, 1.0, channel_threshold=own)})
    )
    double(sparse.get_submodule(NAME))
    run(sparse, tokens)
    assert sparse.get_submodule(NAME).was_threshold.equal(own)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_remembers_nothing_and_watches_its_own_weights(sparse, refreshed, tokens, copied):
    twin = copied(sparse)
    assert twin._was_state.freshness is not sparse._was_state.freshness
    run(twin, tokens)
    assert sorted(refreshed) == sorted(sparse._was_state.schedule.linears)
    refreshed.clear()
    double(twin.get_submodule(NAME))
    run(sparse, tokens)
    assert refreshed == []
    run(twin, tokens)
    assert refreshed == [NAME]


def test_it_keeps_no_module_alive(sparse):
    freshness = sparse._was_state.freshness
    assert len(freshness._stamps) == 14
    was_fx.densify(sparse)
    del sparse
    for module in list(freshness._stamps):
        assert module is not None


def test_the_diagonals_of_several_weights_are_told_apart():
    weights = [torch.eye(3), 2 * torch.eye(70), torch.zeros(2, 5), torch.ones(4, 2).bfloat16()]
    bits = torch.tensor(freshness_module._norms_of_pieces(weights), dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(bits, torch.tensor([3**0.5, 2 * 64**0.5, 0.0, 2**0.5]), atol=1e-2, rtol=1e-2)
    assert freshness_module._norms_of_pieces([]) == []


def test_what_changes_beyond_the_first_rows_and_columns_is_noticed():
    weight = torch.randn(320, 192, generator=torch.Generator().manual_seed(0))
    before = freshness_module._norms_of_pieces([weight, weight.t(), weight[None]])
    for rows, columns in ((slice(None), slice(100, 110)), (slice(310, 320), slice(None))):
        changed = weight.clone()
        changed.data[rows, columns] *= 3
        after = freshness_module._norms_of_pieces([changed, changed.t(), changed[None]])
        assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_fresh_one_looks_at_everything(sparse, refreshed):
    Freshness().refresh(sparse)
    assert sorted(refreshed) == sorted(name for name, each in find_linears(sparse).items() if not each.head)

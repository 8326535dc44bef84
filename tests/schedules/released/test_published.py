"""The published schedules that ship."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from was_fx import load_published
from was_fx.modules.linears import body_linears, find_linears
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.fingerprint import fingerprint_without_weights
from was_fx.schedules.released.published import published_names

# The configurations of the four models, as their Hub pages have them; what has no effect on Linears is left out.
LLAMA_3 = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
)
CONFIGS = {
    "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000),
    "llama-3-8b": LLAMA_3,
    "llama-3.1-8b": LLAMA_3,
    "mistral-7b": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=32000
    ),
}
# The level by true counts, recomputed apart from the package from the releases' tables.
TRUE_LEVELS = {
    "was-llama-2-7b-40": 0.365544,
    "was-llama-2-7b-60": 0.540997,
    "was-llama-2-7b-75": 0.691256,
    "was-llama-3.1-8b-40": 0.395192,
    "was-llama-3.1-8b-60": 0.595312,
    "was-llama-3.1-8b-75": 0.746755,
    "was-mistral-7b-40": 0.393329,
    "was-mistral-7b-60": 0.590565,
    "was-mistral-7b-75": 0.740685,
    "teal-llama-2-7b-40": 0.397927,
    "teal-llama-2-7b-50": 0.501554,
    "teal-llama-3-8b-40": 0.4,
    "teal-llama-3-8b-50": 0.5,
    "teal-mistral-7b-40": 0.4,
    "teal-mistral-7b-50": 0.5,
}


def parts(name: str) -> tuple[str, str, float]:
    method, rest = name.split("-", 1)
    model, level = rest.rsplit("-", 1)
    return method, model, int(level) / 100


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """The models on the meta device, without memory."""
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(config) for name, config in CONFIGS.items()}


def test_fifteen_ship():
    assert published_names() == tuple(sorted(TRUE_LEVELS))


@pytest.mark.parametrize("name", TRUE_LEVELS)
def test_each_says_its_published_and_its_true_level(name):
    schedule = load_published(name)
    method, _, level = parts(name)
    source = schedule.metadata.source
    assert (schedule.metadata.recipe, schedule.metadata.target, source["level"]) == (method, level, level)
    weights = {each: n * k for each, (n, k) in schedule.shapes.items()}
    counted = sum(weights[each] * entry.sparsity for each, entry in schedule.linears.items()) / sum(weights.values())
    assert counted == pytest.approx(TRUE_LEVELS[name], abs=2e-6)
    assert source["level_by_true_counts"] == pytest.approx(counted, abs=1e-6)
    assert source["licence"] == {"was": "Apache-2.0", "teal": "MIT"}[method]
    assert source["repository"].startswith("https://github.com/")
    assert {entry.exponent for entry in schedule.linears.values()} == {1.0 if method == "was" else 0.0}


@pytest.mark.parametrize("name", TRUE_LEVELS)
def test_each_fits_its_model(name, models):
    model = models[parts(name)[1]]
    shapes = {each: linear.shape for each, linear in find_linears(model).items()}
    body = {each: shapes[each] for each in body_linears(model)}
    load_published(name).check(body, fingerprint_without_weights(type(model).__name__, shapes))


def test_a_model_of_the_same_blocks_but_another_name_is_refused(models):
    model = models["mistral-7b"]
    shapes = {each: linear.shape for each, linear in find_linears(model).items()}
    body = {each: shapes[each] for each in body_linears(model)}
    found = fingerprint_without_weights(type(model).__name__, shapes)
    with pytest.raises(ScheduleError, match="the architecture is MistralForCausalLM, expected LlamaForCausalLM"):
        load_published("was-llama-3.1-8b-60").check(body, found)
    load_published("was-llama-3.1-8b-60").check(body, found, allow_other_model=True)


@pytest.mark.parametrize("name", TRUE_LEVELS)
def test_thresholds_are_positive_where_something_is_dropped(name):
    for linear, entry in load_published(name).linears.items():
        assert (entry.threshold > 0) == (entry.sparsity > 0.05), linear


def test_higher_levels_have_higher_thresholds():
    low, high = load_published("was-mistral-7b-40"), load_published("was-mistral-7b-75")
    for name, entry in low.linears.items():
        if entry.sparsity < high.linears[name].sparsity:
            assert entry.threshold < high.linears[name].threshold, name


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"did you mean was-llama-2-7b-60\?.*teal-mistral-7b-50"):
        load_published("was-llama-7b-60")

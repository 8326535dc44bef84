import json

import pytest
import torch

from was_fx.schedules.files.fingerprint import differences, fingerprint, fingerprint_without_weights


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (33, 17), "a": (8, 64), "tiny": (1, 2)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.float(),
        lambda weight: weight.t().contiguous().t(),
        lambda weight: torch.cat([weight, weight], dim=1)[:, : weight.shape[1]],
        lambda weight: torch.nn.Parameter(weight),
    ],
    ids=["fp32", "column-major", "slice", "parameter"],
)
def test_same_model_in_another_form_has_the_same_fingerprint(change):
    expected = fingerprint("Llama", weights())
    assert fingerprint("Llama", {name: change(weight) for name, weight in weights().items()}) == expected
    assert fingerprint("Llama", dict(reversed(weights().items()))) == expected


def test_json_can_hold_it():
    value = fingerprint("Llama", weights())
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("architecture", "other", "expected"),
    [
        ("Llama", weights(), []),
        ("Qwen", weights(), ["the architecture is Qwen, expected Llama"]),
        ("Llama", weights(seed=1), ["the weights have other values"]),
        ("Llama", {"a": weights()["a"]}, ["the names or shapes of the Linears are others"]),
        ("Qwen", weights(seed=1), ["the architecture is Qwen", "the weights have other values"]),
    ],
)
def test_differences(architecture, other, expected):
    found = differences(fingerprint("Llama", weights()), fingerprint(architecture, other))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_without_weights_only_architecture_and_shapes_are_compared():
    shapes = {name: tuple(weight.shape) for name, weight in weights().items()}
    bare = fingerprint_without_weights("Llama", shapes)
    for each in (weights(), weights(seed=1)):
        found = fingerprint("Llama", each)
        assert differences(bare, found) == differences(found, bare) == []
    assert differences(bare, fingerprint("Qwen", weights())) == ["the architecture is Qwen, expected Llama"]
    (difference,) = differences(bare, fingerprint_without_weights("Llama", {**shapes, "a": (8, 65)}))
    assert "names or shapes" in difference

"""The same comparison with other caches, other rotary embeddings, and an image in the prompt."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from was_fx.coverage.decoding import PROMPT, TOKENS, difference, logits, oracle
from was_fx.coverage.tiny_images import image_prompt
from was_fx.coverage.tiny_models import tiny_config, tiny_model
from was_fx.modules.text_decoder import takes_more_than_text
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.sparsify import densify, sparsify

_CACHES = ("static", "offloaded")
# Kinds of rotary embeddings, with what they need beside a theta.
_TRAINED = {"factor": 2.0, "original_max_position_embeddings": 16}
_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": _TRAINED,
    "longrope": {**_TRAINED, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "llama3": {**_TRAINED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def differences(model_type: str, model: nn.Module, schedule: Schedule) -> dict[str, float]:
    """How far logits at the sparsity of `schedule` are from the oracle's, by variant. What the dense model itself can't
    do is left out.

    Args:
        model_type: what `model` is of.
        model: dense; it is dense again afterwards.
        schedule: of it.
    """
    found = {}
    for name, other, settings in _variants(model_type, model):
        try:
            expected = oracle(other, schedule, **copy.deepcopy(settings))
        except Exception:
            continue
        sparsify(other, schedule, prefill="all", allow_other_model=True)
        found[name] = difference(logits(other, **copy.deepcopy(settings)), expected)
        densify(other)
    return found


def _variants(model_type: str, model: nn.Module) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, dense model, arguments of `generate()`)."""
    for cache in _CACHES:
        yield f"{cache} cache", model, {"cache_implementation": cache}
    if takes_more_than_text(model):
        try:
            prompt = image_prompt(model, TOKENS[:1, :PROMPT])
        except Exception:
            prompt = None  # it takes images in another way than most
        if prompt is not None:
            yield "image", model, prompt
    for kind in _ropes(model_type):
        try:
            other = tiny_model(model_type, rope=_ROPES[kind] | {"rope_type": kind})
        except Exception:
            continue  # a class that has its own kind
        other.load_state_dict(model.state_dict())
        yield f"{kind} RoPE", other, {}


def _ropes(model_type: str) -> tuple[str, ...]:
    """The kinds of rotary embeddings to try: none for a class that has no plain one."""
    rope = getattr(tiny_config(model_type).get_text_config(decoder=True), "rope_parameters", None)
    return tuple(_ROPES) if isinstance(rope, dict) and rope.get("rope_type") == "default" else ()

"""What differs between versions of transformers in `generate()`, and the private names of it that are used.

Each says what it is for; `tests/was_fx/compat` fails when one is gone.
"""

import inspect
from collections.abc import Mapping
from typing import Any

# The name of the cache among a model's arguments: until 5.23, from 5.24, and of models with linear attention only.
CACHE_NAMES = ("past_key_values", "cache", "cache_params")


def cache_among(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """(name, cache) of the cache among arguments of a model or of `generate()`; ("", None) without one."""
    return next(((name, arguments[name]) for name in CACHE_NAMES if arguments.get(name) is not None), ("", None))


def cache_argument(model: Any) -> str:
    """The name of the cache among the arguments of a model's forward.

    Raises:
        ValueError: it takes none.
    """
    takes = inspect.signature(type(model).forward).parameters
    found = next((name for name in CACHE_NAMES if name in takes), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} takes no cache (none of {', '.join(CACHE_NAMES)})")
    return found


def is_callers(cache: Any) -> bool:
    """Whether `generate()` was given this cache, and has not made it."""
    return bool(getattr(cache, "_is_user_defined", False))  # set by `_prepare_cache_for_generation`


def decoding_method(model: Any, config: Any, arguments: Mapping[str, Any]) -> Any:
    """The decoding method of transformers for these settings: `_sample`, `_beam_search`, …"""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    return getattr(model, GENERATION_MODES_MAPPING[config.get_generation_mode(arguments.get("assistant_model"))])


def pad_token(config: Any) -> Any:
    """The padding token as a tensor on the inputs' device; None where there is none. Set by `generate()`."""
    return getattr(config, "_pad_token_tensor", None)


def end_tokens(criteria: Any) -> Any:
    """The tokens that end a sequence, [n] on the inputs' device, where stopping criteria ask for nothing but those
    and a length; None where there are others."""
    import torch
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    if not all(type(each) in (EosTokenCriteria, MaxLengthCriteria) for each in criteria):
        return None
    found = [each.eos_token_id.reshape(-1) for each in criteria if isinstance(each, EosTokenCriteria)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def static_layers(cache: Any) -> list[Any] | None:
    """The layers of a cache if all of them are static and nothing is offloaded; else None."""
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, StaticLayer) for layer in layers) or getattr(cache, "offloading", False):
        return None
    return list(layers)


def full_length_cache(model: Any, length: int | None) -> Any:
    """An empty cache from which any number of tokens can be taken back: each layer holds the whole text, one with a
    sliding window too, for which the mask leaves out what lies before the window.

    Args:
        model: a decoder with a configuration.
        length: tokens of a static cache; None for one that grows.

    Returns:
        The cache, or None if a layer keeps something else than keys and values of each token, such as a state.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer, StaticSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    static = StaticCache(config=config, max_cache_len=length or 1)
    if not static.layers or any(type(each) not in (StaticLayer, StaticSlidingWindowLayer) for each in static.layers):
        return None
    if length is not None:
        static.layers = [StaticLayer(max_cache_len=length) for _ in static.layers]
        return static
    growing = DynamicCache(config=config)
    growing.layers = [DynamicLayer() for _ in static.layers]
    return growing


def may_be_taken_back(cache: Any) -> bool:
    """Whether `take_back` serves a static cache that was not made by `full_length_cache`: from a window that has moved
    on nothing can be taken back."""
    from transformers.cache_utils import StaticLayer

    return bool(cache.layers) and all(type(layer) is StaticLayer for layer in cache.layers)


def take_back(cache: Any, tokens: int) -> None:
    """Take the last tokens out of a cache of `full_length_cache`, or one that `may_be_taken_back`."""
    if not tokens:
        return
    if static_layers(cache) is None:
        cache.crop(-tokens)  # `crop` of static layers came with 5.2x, and goes through them one by one
    else:
        import torch

        torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], tokens)


def keeps_a_state(model: Any) -> bool:
    """Whether a model's cache holds more than keys and values of each token, such as the state of Mamba, or what an
    indexer remembers. transformers refuses drafts for some of these, and for others writes another text with them."""
    return bool(getattr(model, "_is_stateful", False)) or full_length_cache(model, None) is None


def attention_of(model: Any) -> str:
    """The name of a model's attention, such as "sdpa"; "" where there is none."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "") or "")


def uses_flash_attention(model: Any) -> bool:
    """Whether a model's attention needs a cache that grows: flash attention reads no mask."""
    return "flash" in attention_of(model)

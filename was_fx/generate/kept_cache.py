"""A static cache that outlives its call of `generate()`."""

from typing import Any

import torch

from was_fx.compat.generation import static_layers

# Share of a GPU's memory that may be kept between calls.
_SHARE = 0.01


class KeptCache:
    """The cache of the last call, where `generate()` made it itself: the next call of the same size takes it, so that
    the steps captured with it serve again."""

    def __init__(self) -> None:
        self._kept: Any = None

    def reused(self, cache: Any, model: Any, batch: int) -> Any:
        """The kept cache, emptied, if it is like `cache`, which has not been used; else `cache`."""
        kept, self._kept = self._kept, None  # nobody else's while it is in use
        ours, theirs = static_layers(kept), static_layers(cache)
        if ours is None or theirs is None or len(ours) != len(theirs):
            return cache
        for mine, other in zip(ours, theirs, strict=True):
            if type(mine) is not type(other) or (mine.max_cache_len, mine.batch_size) != (other.max_cache_len, batch):
                return cache
            keys = mine.keys
            if keys is None or (keys.dtype, keys.device) != (model.dtype, model.device):
                return cache
        kept.reset()
        return kept

    def keep(self, cache: Any) -> None:
        """Have a cache for the next call, if it is static and small enough."""
        if static_layers(cache) and may_be_kept(cache):
            self._kept = cache


def may_be_kept(cache: Any) -> bool:
    """Whether a cache is small enough to stay in memory until the next call."""
    held = [each for layer in cache.layers for each in (layer.keys, layer.values) if each is not None]
    if not held or not held[0].is_cuda:
        return False
    total = torch.cuda.get_device_properties(held[0].device).total_memory
    return sum(each.nbytes for each in held) <= _SHARE * total

"""KV caches that Dynamo can't trace: quantised by quanto or HQQ, or offloaded to CPU memory.

A sparsified model runs as one graph. The update of such a cache calls code that has no graph (foreign kernels, CUDA
streams), so with one the model runs as several graphs, cut at every update, with all its Linears sparse as ever. Caches
in FP8 need none of this.
"""

from functools import lru_cache
from typing import Any

import torch

_OPAQUE = {"QuantoQuantizedLayer", "HQQQuantizedLayer"}


def hide_updates(cache: Any) -> bool:
    """Whether the updates of this cache, or None, must stay out of graphs; from now on they do."""
    opaque = any(type(layer).__name__ in _OPAQUE for layer in getattr(cache, "layers", ()))
    if not opaque and not getattr(cache, "offloading", False):
        return False
    if not hasattr(cache, "_was_fx_hidden"):
        cache.__class__ = _hidden(type(cache))  # type: ignore[arg-type]  # a class is hashable
    return True


@lru_cache
def _hidden(cache: type) -> type:
    """A cache class of the same name with an update that stays out of graphs; one per class, as graphs guard on it."""
    update: Any = torch.compiler.disable(cache.update)  # type: ignore[attr-defined]
    return type(cache.__name__, (cache,), {"update": update, "_was_fx_hidden": True})

"""Decoding with a KV cache that Dynamo can't trace: quantised by quanto or HQQ, or offloaded to CPU memory.

A sparsified model runs as one graph. The update of such a cache calls code that has no graph (foreign kernels, CUDA
streams), so with one the model runs as several graphs, cut at every update, with all its Linears sparse as ever. Caches
in FP8 need none of this.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any

import torch

from was_fx.backend import was

_OPAQUE = {"QuantoQuantizedLayer", "HQQQuantizedLayer"}


def cut_at_untraceable_cache(
    whole: Callable[..., Any], function: Callable[..., Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """`whole`, the compiled call of a model, or `function` compiled in parts when the cache can't be traced.

    Args:
        whole: `function` compiled as one graph.
        function: a bound method of a model.
        options: of the backend "was".
    """
    import torch._dynamo

    in_parts = torch.compile(function, backend=was, dynamic=True, options=dict(options))
    # Past the limit of recompilations Dynamo would run the model dense; it must raise instead.
    settings = torch._dynamo.config.patch(
        specialize_float=True,
        fail_on_recompile_limit_hit=True,
        recompile_limit=1024,  # some graphs are made for each block
        accumulated_recompile_limit=8192,
    )

    @wraps(whole)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling() or not _hide_updates(keywords.get("past_key_values")):
            return whole(*arguments, **keywords)
        with settings:
            return in_parts(*arguments, **keywords)

    return call


def _hide_updates(cache: Any) -> bool:
    """Whether the updates of this cache must stay out of graphs; from now on they do."""
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

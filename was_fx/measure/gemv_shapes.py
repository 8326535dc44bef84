"""Which products a model's decode step makes on a GPU: the shapes to tune for."""

import copy
from typing import Any

import torch

from was_fx.compat.generation import cache_argument
from was_fx.generate.compiled_step import CompiledStep
from was_fx.kernels.parts.gemv_config import Shape
from was_fx.measure.sequential import uniform_while_dropping
from was_fx.measure.speed import random_model
from was_fx.sparse.quantize import quantize
from was_fx.sparse.sparsify import sparsify
from was_fx.sparse.weight_plan import Weights


@torch.no_grad()
def gemv_shapes(config: Any, dtype: torch.dtype = torch.bfloat16, weights: Weights | None = None) -> list[Shape]:
    """The shape of every product, found by decoding a token with two blocks of random weights.

    Args:
        config: a causal LM's configuration.
        dtype: of the weights; the format of those that are not quantised.
        weights: formats to quantise them in first, as for `was_fx.quantize`: "int8" and "int4" are found.
    """
    from transformers import StaticCache

    from was_fx.kernels.parts.gemv_config import REQUESTED

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    model = random_model(small, dtype=dtype, device="cuda")
    if weights is not None:
        quantize(model, weights)
    ids = torch.randint(text.vocab_size, (1, 16))
    sparsify(model, uniform_while_dropping(model, ids, 0.5))
    # The passes merge Linears that share an input, so the shapes are those of a compiled step; Inductor changes none.
    step = CompiledStep(model, {"lowering": "eager", "cuda_graphs": False})
    before = set(REQUESTED)
    REQUESTED.clear()
    cache = {cache_argument(model): StaticCache(config=small, max_cache_len=32), "use_cache": True}
    model(input_ids=ids.cuda(), **cache)
    step(input_ids=ids[:, :1].cuda(), position_ids=torch.tensor([[ids.shape[1]]], device="cuda"), **cache)
    found = sorted(REQUESTED, key=str)
    REQUESTED.update(before)
    return found

"""`QuantizedEmbedding`: input embeddings whose weight is held as rows of int8 or int4.

The weight E [V, D] lies as that of a head does, D rows of V codes, for it often is that of the head: tied embeddings
read column v of the head's codes and hold nothing themselves. int8 has one scale for each token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.quantized.rows import QuantizedRows
from was_fx.modules.class_swap import Swapped, class_before, swap_class, with_mixin
from was_fx.modules.linears import LinearModule, embedding
from was_fx.modules.quantized_linear import NAMES, format_name
from was_fx.modules.weights import is_offloaded, is_sharded

TIED = "tied"  # the format of embeddings that read the head's codes


class QuantizedEmbedding(Swapped):
    """What quantised embeddings have beyond the class that they were.

    Attributes:
        codes, scales, groups: as in `QuantizedRows`; buffers, None where they are tied.
        was_head: the head whose codes are read, alone in a tuple so that it is no child; empty if they are not tied.
        was_like: an empty buffer of the dtype that the module gives.
        was_scale: fp32, what the class before multiplies what it has looked up with; None if with nothing.
    """

    was_fp32 = ("scales", "was_scale")

    codes: Tensor | None
    scales: Tensor | None
    groups: Tensor | None
    was_head: tuple[Any, ...]
    was_like: Tensor
    was_scale: Tensor | None

    @property
    def was_rows(self) -> QuantizedRows:
        """The weight E [V, D]."""
        if self.was_head:
            return self.was_head[0].was_rows
        assert self.codes is not None
        assert self.scales is not None
        return QuantizedRows(self.codes, self.scales, self.groups)

    @property
    def weight(self) -> Tensor:
        """E [V, D], dequantised anew each time."""
        return self.was_rows.dequantize(self.was_like.dtype).t()

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] of token ids [...]; on the device of the ids."""
        rows = self.was_rows
        ids = input.reshape(-1).to(rows.codes.device)
        found = rows.dequantize_outputs(self.was_like.dtype, ids).view(*input.shape, rows.shape[1]).to(input.device)
        return found if self.was_scale is None else found * self.was_scale.to(found)


@torch.inference_mode(False)
def make_quantized_embedding(module: Any, rows: QuantizedRows | None, head: Any = None) -> None:
    """Turn embeddings into quantised ones, in place; on the meta device, call `settle` when they are loaded.

    Args:
        module: `nn.Embedding` or a subclass, of which `why_not` is empty.
        rows: their weight E [V, D]; None if they are tied.
        head: the quantised head that they are tied to.
    """
    weight = module._parameters.pop("weight")
    scale = None if weight.is_meta else _scale(module, type(module))
    for name in NAMES:
        module.register_buffer(name, None if rows is None else getattr(rows, name))
    module.register_buffer("was_like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
    module.register_buffer("was_scale", scale, persistent=False)
    module.was_head = () if head is None else (head,)
    swap_class(module, with_mixin(QuantizedEmbedding, type(module)))


def settle(module: Any) -> None:
    """Give embeddings that were made on the meta device what they have beside their codes.

    Raises:
        ValueError: their class does something else than to look up and scale.
    """
    device = module.was_rows.codes.device
    module.was_like = torch.empty_like(module.was_like, device=device)
    module.was_scale = _scale(module, class_before(module))


def why_not(module: Any) -> str:
    """Why embeddings can't be quantised; "" if they can."""
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Embedding) or weight is None or not weight.is_floating_point():
        return f"a {type(module).__name__} holds no plain weight"
    if is_sharded(weight) or is_offloaded(weight):
        return "they are offloaded or sharded"
    if module.max_norm is not None:
        return "max_norm changes their weight at each look-up"
    try:
        scale = _scale(module, type(module))
    except ValueError as error:
        return str(error)
    ids = torch.tensor([0, len(weight) // 2, len(weight) - 1], device=weight.device)
    with torch.no_grad():
        found, expected = type(module).forward(module, ids), weight[ids]
        expected = expected if scale is None else expected * scale.to(expected)
    return "" if torch.allclose(found, expected, rtol=1e-2, atol=1e-4, equal_nan=True) else _does_more(type(module))


def input_embedding(model: nn.Module) -> tuple[str, Any] | None:
    """The input embeddings of a model and their qualified name."""
    found = embedding(model, "get_input_embeddings")
    return next(((name, module) for name, module in model.named_modules() if module is found), None)


def is_tied(module: Any, head: LinearModule | None) -> bool:
    """Whether embeddings share their weight with a head."""
    return head is not None and module._parameters.get("weight") is head.parameter


def embedding_formats(model: nn.Module) -> dict[str, str]:
    """The format of quantised input embeddings by qualified name, or "tied"."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding)}
    return {name: TIED if module.was_head else format_name(module.was_rows) for name, module in modules.items()}


@torch.no_grad()
def _scale(module: Any, kind: Any) -> Tensor | None:
    """What a class of embeddings multiplies what it looks up with, fp32: what it makes of a weight of ones.

    Raises:
        ValueError: it does something else.
    """
    if kind.forward is nn.Embedding.forward:
        return None
    device = module.was_like.device if hasattr(module, "was_like") else None
    device = device or next((each.device for each in module.buffers()), torch.device("cpu"))
    ids = torch.zeros(1, dtype=torch.long, device=device)
    stand_in = object.__new__(kind)
    stand_in.__dict__ = dict(module.__dict__)
    made = []
    for value in (1.0, 2.0):
        weight = torch.full((1, 1), value, device=device).expand(module.num_embeddings, module.embedding_dim)
        stand_in.__dict__["_parameters"] = {"weight": weight}
        try:
            made.append(kind.forward(stand_in, ids).float())
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(_does_more(kind)) from error
    once, twice = made
    scale = once.flatten()[0]
    if once.shape != (1, module.embedding_dim) or not bool(
        (once == scale).all() and (twice == 2 * scale).all() and scale
    ):
        raise ValueError(_does_more(kind))
    return scale.clone()


def _does_more(kind: Any) -> str:
    return f"{kind.__name__} does more than to look up and scale"

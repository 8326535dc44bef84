"""Keep sparse Linears in step with their weights: thresholds that depend on them, and their place in memory.

A weight may be replaced, loaded anew, moved or changed in place at any time. Before each prompt, unless it is being
traced, every sparse Linear's weight is looked at: is it another tensor, has its version counter moved, or, as writes
through `.data` move no counter, has the norm of a piece of its diagonal changed? Then its channel thresholds are
computed again, and rows of Wᵀ that are not contiguous are made so.
"""

from collections import defaultdict
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from was_fx.compat.tensors import version
from was_fx.modules.linears import LinearModule, is_conv1d
from was_fx.modules.placement import make_input_major
from was_fx.modules.quantized_linear import QuantizedLinear
from was_fx.modules.sparse_linear import sparse_linears, take_norms
from was_fx.modules.token_rule import body_of, prompt_begins
from was_fx.modules.weights import is_offloaded, local

_PIECE = 64


class Freshness:
    """What the weights of a model's sparse Linears were when their thresholds were computed."""

    def __init__(self) -> None:
        self._stamps: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()

    def watch(self, model: nn.Module) -> list[Any]:
        """Look before every prompt of `model`, and of its body where that is called alone. For after the token rule's.

        Returns:
            Handles of the hooks.
        """
        body = body_of(model)
        handles: list[Any] = [
            model.register_forward_pre_hook(self.before_model),
            model.register_load_state_dict_post_hook(self.after_loading),
        ]
        if body is not None:
            handles.append(body.register_forward_pre_hook(self.before_body))
        return handles

    def before_model(self, model: nn.Module, _: Any) -> None:
        """Hook: refresh at a prompt."""
        self._before("model", model)

    def before_body(self, body: nn.Module, _: Any) -> None:
        """Hook: refresh at a prompt of the body alone."""
        self._before("body", body)

    def after_loading(self, model: nn.Module, _: Any) -> None:
        """Hook: refresh when a state dict was loaded, for compiled calls don't look."""
        self.refresh(model)

    def _before(self, role: Literal["model", "body"], module: nn.Module) -> None:
        if not torch.compiler.is_compiling() and prompt_begins(role):
            self.refresh(module)

    def remember(self, model: nn.Module) -> None:
        """Take the weights as they are for those that the thresholds are of."""
        for _, module, stamp in _stamped(model):
            self._stamps[module] = stamp

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Bring up to date what has changed since the last call; everything that is not remembered."""
        for name, module, stamp in _stamped(model):
            if self._stamps.get(module) == stamp:
                continue
            linear = LinearModule(name, module, is_conv1d(module), module.was_is_head)
            take_norms(linear)
            make_input_major(linear)
            self._stamps[module] = _stamp(module, stamp[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Freshness":
        return Freshness()  # a copy's weights are other tensors

    def __reduce__(self) -> Any:
        return Freshness, ()


def _stamped(model: nn.Module) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """(name, module, stamp) of each sparse Linear whose weight is loaded."""
    modules = {name: module for name, module in sparse_linears(model).items() if not is_offloaded(_held(module))}
    pieces = _norms_of_pieces([local(_held(module)) for module in modules.values()])
    return [
        (name, module, _stamp(module, piece)) for (name, module), piece in zip(modules.items(), pieces, strict=True)
    ]


def _held(module: Any) -> Tensor:
    """The weight, or what of a quantised one can be told from another: its scales, a matrix of one row."""
    return module.scales[None] if isinstance(module, QuantizedLinear) else module.weight


def _stamp(module: Any, piece: int) -> tuple[Any, ...]:
    weight = module.scales if isinstance(module, QuantizedLinear) else module.weight
    return id(weight), local(weight).data_ptr(), version(weight), weight.dtype, piece


def _norms_of_pieces(weights: list[Tensor]) -> list[int]:
    """The norm of a piece of each weight's diagonal, as the bits of a float; one transfer per device."""
    places: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, weight in enumerate(weights):
        places[weight.device].append(place)
    found = [0] * len(weights)
    for each in places.values():
        norms = torch._foreach_norm([weights[place].data[:_PIECE, :_PIECE].diagonal() for place in each])
        bits = torch.stack([norm.float() for norm in norms]).view(torch.int32).tolist()
        for place, piece in zip(each, bits, strict=True):
            found[place] = piece
    return found

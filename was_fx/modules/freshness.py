"""Keep sparse Linears in step with their weights: thresholds that depend on them, and their place in memory.

A weight may be replaced, loaded anew, moved or changed in place at any time. Before each prompt, unless it is being
traced, every sparse Linear's weight is looked at: is it another tensor, has its version counter moved, or, as writes
through `.data` move no counter, has the norm of a few numbers spread over it changed? Then its channel thresholds are
computed again, and rows of Wᵀ that are not contiguous are made so.
"""

from collections import defaultdict
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from was_fx.compat.tensors import version
from was_fx.modules.experts import weight_names
from was_fx.modules.linears import LinearModule, is_conv1d, unsupported_format
from was_fx.modules.placement import make_input_major
from was_fx.modules.quantized_experts import is_quantized
from was_fx.modules.quantized_linear import QuantizedLinear
from was_fx.modules.sparse_experts import SparseExperts
from was_fx.modules.sparse_linear import sparse_modules, take_norms
from was_fx.modules.weights import is_offloaded, local
from was_fx.schedules.experts import member

_PIECE = 64


class Freshness:
    """What the weights of a model's sparse Linears were when their thresholds were computed."""

    def __init__(self) -> None:
        self._stamps: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, ...]]] = WeakKeyDictionary()

    def watch(self, model: nn.Module) -> list[Any]:
        """Refresh each sparse Linear whose state is loaded, with the model or alone.

        Returns:
            Handles of the hooks.
        """
        return [
            module.register_load_state_dict_post_hook(self.after_loading) for module in sparse_modules(model).values()
        ]

    def after_loading(self, module: nn.Module, _: Any) -> None:
        """Hook: refresh a sparse Linear whose state was loaded, for compiled calls don't look."""
        self.refresh(module)

    def remember(self, model: nn.Module) -> None:
        """Take the weights as they are for those that the thresholds are of."""
        for weight, stamp in _stamped(model):
            self._stamps.setdefault(weight.module, {})[weight.held] = stamp

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Bring up to date what has changed since the last call; everything that is not remembered."""
        for weight, stamp in _stamped(model):
            known = self._stamps.setdefault(weight.module, {})
            if known.get(weight.held) == stamp:
                continue
            for linear in weight.linears():
                take_norms(linear)
                make_input_major(linear)
            known[weight.held] = _stamp(weight, stamp[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Freshness":
        return Freshness()  # a copy's weights are other tensors

    def __reduce__(self) -> Any:
        return Freshness, ()


class _Weight(NamedTuple):
    """A weight of sparse Linears: one's own, or the one that the experts of a module share."""

    name: str
    module: Any
    held: str

    @property
    def tensor(self) -> Tensor:
        """The weight, or what of a quantised one can be told from another: its scales."""
        if is_quantized(self.module, self.held):
            scales: Tensor = getattr(self.module, f"{self.held}_scales")
            return scales
        return self.module.scales if isinstance(self.module, QuantizedLinear) else getattr(self.module, self.held)

    def linears(self) -> list[LinearModule]:
        """The sparse Linears that lie in it."""
        module: Any = self.module
        if isinstance(self.module, SparseExperts):
            return [
                LinearModule(member(f"{self.name}.{held}", expert), module, module.is_transposed, False, held, expert)
                for held, expert in module.was_entries
                if held == self.held
            ]
        return [LinearModule(self.name, module, is_conv1d(module), module.was_is_head)]


def _stamped(model: nn.Module) -> list[tuple[_Weight, tuple[Any, ...]]]:
    """Each weight of sparse Linears that is loaded, with its stamp.

    Raises:
        ValueError: one was quantised by another library since it was made sparse.
    """
    weights = [
        _Weight(name, module, held)
        for name, module in sparse_modules(model).items()
        for held in (weight_names(module) if isinstance(module, SparseExperts) else ("weight",))
    ]
    weights = [weight for weight in weights if not is_offloaded(weight.tensor)]
    for weight in weights:
        stored = unsupported_format(weight.tensor)
        if stored is not None and not isinstance(weight.module, QuantizedLinear | SparseExperts):
            raise ValueError(
                f"{weight.name} is stored as {stored} since it was made sparse, and no sparse product reads that: load "
                "the model again, and quantise it by was_fx.quantize(model, 'int8') before calibrate"
            )
    pieces = _norms_of_pieces([local(weight.tensor) for weight in weights])
    return [(weight, _stamp(weight, piece)) for weight, piece in zip(weights, pieces, strict=True)]


def _stamp(weight: _Weight, piece: int) -> tuple[Any, ...]:
    tensor = weight.tensor
    return id(tensor), local(tensor).data_ptr(), version(tensor), tensor.dtype, piece


def _piece(weight: Tensor) -> Tensor:
    """A few numbers of a weight [N], [N, K] or [E, N, K]: a diagonal of rows and columns that are spread over it."""
    data = weight.data if weight.dim() > 1 else weight.data[None]
    rows, columns = (max(1, size // _PIECE) for size in data.shape[-2:])
    return data[..., ::rows, ::columns].diagonal(dim1=-2, dim2=-1)[..., :_PIECE]


def _norms_of_pieces(weights: list[Tensor]) -> list[int]:
    """The norm of a few numbers of each weight, as the bits of a float; one transfer per device."""
    places: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, weight in enumerate(weights):
        places[weight.device].append(place)
    found = [0] * len(weights)
    for each in places.values():
        norms = torch._foreach_norm([_piece(weights[place]) for place in each])
        bits = torch.stack([norm.float() for norm in norms]).view(torch.int32).tolist()
        for place, piece in zip(each, bits, strict=True):
            found[place] = piece
    return found

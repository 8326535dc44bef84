"""`SparseLinear`: a Linear that drops its weak input channels. The meaning of a sparsified model lies here.

`make_sparse` turns a Linear into one in place: the module stays the same object, with the same Parameters, hooks and
place in the model; its class becomes a subclass of its own, and its thresholds a buffer that no state dict holds. Its
forward is one op, so it is right in eager mode, under any compiler, copied, pickled and moved.
"""

from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.linear import dense_linear, sparse_linear
from was_fx.kernels.ops.count_dropped import count_dropped_op
from was_fx.modules.class_swap import Swapped, class_before, swap_class, with_mixin
from was_fx.modules.linears import LinearModule
from was_fx.modules.placement import own_channels, whole_channel_norms
from was_fx.modules.quantized_linear import QuantizedLinear, product
from was_fx.modules.sparse_experts import SparseExperts, begin_sparse, end_sparse
from was_fx.modules.token_rule import TokenRule, decided
from was_fx.schedules.files.linear_schedule import LinearSchedule


class SparseLinear(Swapped):
    """What a sparse Linear has beyond the class that it was.

    Attributes:
        was_threshold: channel thresholds t [K] fp32, a non-persistent buffer; of this rank's channels if sharded.
        was_norms: channel norms g [K] fp32 of the whole weight, a non-persistent buffer.
        was_counts: [2] int64, dropped channels and channels seen of sparse tokens, while they are counted; else None.
        was_entry: the numbers of its schedule.
        was_norm: p of the channel norms.
        was_rule: which tokens are sparse when it is called by itself.
        was_is_head: it computes the logits, after the model's body.
    """

    was_fp32 = ("was_norms", "was_threshold")

    weight: Tensor
    bias: Tensor | None
    was_threshold: Tensor
    was_norms: Tensor
    was_counts: Tensor | None
    was_entry: LinearSchedule
    was_norm: int
    was_rule: TokenRule
    was_is_head: bool

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] of x [..., K]; dense where the call's tokens are, else `was::sparse_linear`."""
        dense, tokens = decided(self, input)  # type: ignore[arg-type]
        if isinstance(self, QuantizedLinear):
            if not dense and self.was_counts is not None:
                count_dropped_op(input, self.was_threshold, self.was_counts, tokens)
            return product(self, input, None if dense else self.was_threshold, tokens)
        weight, bias = self.weight, self.bias
        if self.was_input_major:
            weight = weight.t()
        if dense:
            if not input.is_cpu or torch.is_autocast_enabled("cpu"):
                return super().forward(input)  # type: ignore[misc]
            return dense_linear.call(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if self.was_counts is not None:
            count_dropped_op(input, self.was_threshold, self.was_counts, tokens)
        return sparse_linear.call(input, weight, bias, self.was_threshold, tokens)


@torch.inference_mode(False)
def make_sparse(linear: LinearModule, entry: LinearSchedule, norm: int, rule: TokenRule) -> None:
    """Turn a Linear into a sparse one, in place; of an expert's, the module that holds it.

    Args:
        linear: W [N, K], loaded or offloaded, whole or a rank's part.
        entry: its numbers.
        norm: p of the channel norms.
        rule: which tokens are sparse.
    """
    module: Any = linear.module
    norms = whole_channel_norms(linear, norm)
    if linear.expert is not None:
        begin_sparse(module, norm, rule)
        getattr(module, f"was_norms_{linear.held}")[linear.expert] = norms
        set_numbers(linear, entry)
        return
    module.register_buffer("was_norms", norms, persistent=False)
    module.register_buffer("was_threshold", own_channels(entry.channel_thresholds(norms), linear), persistent=False)
    module.register_buffer("was_counts", None, persistent=False)
    module.was_entry, module.was_norm, module.was_rule, module.was_is_head = entry, norm, rule, linear.head
    swap_class(module, with_mixin(SparseLinear, type(module)))


def make_dense(module: nn.Module) -> None:
    """Undo `make_sparse`, of all experts of a module."""
    if isinstance(module, SparseExperts):
        end_sparse(module)
        return
    for name in ("was_norms", "was_threshold", "was_counts"):
        delattr(module, name)
    for name in ("was_entry", "was_norm", "was_rule", "was_is_head"):
        delattr(module, name)
    swap_class(module, class_before(module))


@torch.inference_mode(False)
@torch.no_grad()
def set_numbers(linear: LinearModule, entry: LinearSchedule) -> None:
    """Give a sparse Linear other numbers; its threshold buffer stays where it is."""
    module: Any = linear.module
    if linear.expert is not None:
        norms = getattr(module, f"was_norms_{linear.held}")[linear.expert]
        module.was_entries[linear.held, linear.expert] = entry
        getattr(module, f"was_threshold_{linear.held}")[linear.expert] = entry.channel_thresholds(norms)
        return
    module.was_entry = entry
    module.was_threshold.copy_(own_channels(entry.channel_thresholds(module.was_norms), linear))


@torch.inference_mode(False)
@torch.no_grad()
def take_norms(linear: LinearModule) -> None:
    """Take a sparse Linear's channel norms from its weight as it is now, and its thresholds from them."""
    module: Any = linear.module
    if linear.expert is not None:
        norms = getattr(module, f"was_norms_{linear.held}")
        norms[linear.expert] = whole_channel_norms(linear, module.was_norm)
        set_numbers(linear, module.was_entries[linear.held, linear.expert])
        return
    module.was_norms.copy_(whole_channel_norms(linear, module.was_norm))
    set_numbers(linear, module.was_entry)


def eager_code() -> tuple[CodeType, ...]:
    """The code of sparse modules that runs when nothing is compiled, for `noting_served`."""
    return SparseLinear.forward.__code__, SparseExperts.forward.__code__


def is_sparse(linear: LinearModule) -> bool:
    """Whether a Linear drops channels by a schedule."""
    if linear.expert is None:
        return isinstance(linear.module, SparseLinear)
    return isinstance(linear.module, SparseExperts) and (linear.held, linear.expert) in linear.module.was_entries


def sparse_threshold(linear: LinearModule) -> Tensor:
    """Channel thresholds [K] of a sparse Linear, as its module holds them; of an expert a view."""
    module: Any = linear.module
    found: Tensor = module.was_threshold if linear.expert is None else getattr(module, f"was_threshold_{linear.held}")
    return found if linear.expert is None else found[linear.expert]


def sparse_modules(model: nn.Module) -> dict[str, Any]:
    """The sparse Linears and experts of a model, by the qualified name that they have now (PEFT adds `base_layer` to
    it)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (SparseLinear, SparseExperts))}


def sparse_linears(model: nn.Module) -> dict[str, Any]:
    """Those of `sparse_modules` that are Linears."""
    return {name: module for name, module in sparse_modules(model).items() if isinstance(module, SparseLinear)}

"""`SparseExperts`: experts held as 3-D parameters, each of which drops the weak input channels of its own matrices.

As `SparseLinear` does, the module stays the same object with the same Parameters; its class becomes a subclass of its
own and its thresholds buffers. Each of its two products is one op for all chosen experts. Tokens that keep every
channel go through transformers' own function on a GPU, which reads the same storage.
"""

from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.experts import apply_gate, implementation_of, register_function, registered_function
from was_fx.kernels.linear import sparse_experts
from was_fx.kernels.ops.count_dropped import count_dropped_by_expert_op
from was_fx.modules import quantized_experts
from was_fx.modules.class_swap import Swapped, class_before, swap_class, with_mixin
from was_fx.modules.experts import bias_of, weight_names, weight_of, weighted
from was_fx.modules.quantized_experts import is_quantized
from was_fx.modules.token_rule import TokenRule, decided
from was_fx.schedules.files.linear_schedule import LinearSchedule

# The name of `experts_forward` among transformers' experts functions.
NAME = "was"
# What serves tokens that keep every channel where a configuration chooses ours.
_OTHERWISE = "grouped_mm"


class SparseExperts(Swapped):
    """What sparse experts have beyond the class that they were. Buffers are non-persistent, and named after the
    parameter that they go with.

    Attributes:
        was_threshold_…: channel thresholds t [E, K] fp32; -1 for an expert that is not scheduled, which keeps all.
        was_norms_…: channel norms g [E, K] fp32.
        was_counts_…: [E, 2] int64, dropped channels and channels seen, while they are counted; else None.
        was_entries: the numbers of its schedule, by parameter and expert.
        was_norm: p of the channel norms.
        was_rule: which tokens are sparse when it is called by itself.
    """

    was_product = False
    was_is_head = False
    was_fp32 = tuple(
        f"was_{kind}_{name}" for kind in ("threshold", "norms") for name in ("gate_up_proj", "up_proj", "down_proj")
    )

    was_entries: dict[tuple[str, int], LinearSchedule]
    was_norm: int
    was_rule: TokenRule

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of T tokens [T, K], their experts [T, c] and the weights of those [T, c]."""
        dense, tokens = decided(self, hidden_states)
        if dense and not hidden_states.is_cpu:
            return _dense(self, hidden_states, top_k_index, top_k_weights)
        if tokens is not None:
            tokens = tokens.reshape(-1)
        x, experts = hidden_states, top_k_index.reshape(-1)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        up, down = weight_names(self)
        y = apply_gate(self, _product(self, up, x, experts, dense, tokens))
        if tokens is not None:
            tokens = tokens.repeat_interleave(top_k_index.shape[1])
        y = _product(self, down, y, experts, dense, tokens)
        return weighted(self, y, top_k_index, top_k_weights).to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, experts: Tensor, dense: bool, tokens: Tensor | None) -> Tensor:
    """y [S, N] of x [R, K] by the experts of each row."""
    threshold, counts = getattr(module, f"was_threshold_{name}"), getattr(module, f"was_counts_{name}")
    if counts is not None and not dense:
        count_dropped_by_expert_op(x, threshold, counts, experts, tokens)
    if is_quantized(module, name):
        return quantized_experts.product(module, name, x, experts, None if dense else threshold, tokens)
    weight, bias = weight_of(module, name), bias_of(module, name)
    if weight.dtype != x.dtype:  # autocast
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return sparse_experts.call(x, weight, bias, None if dense else threshold, experts, tokens)


def _dense(module: Any, *arguments: Tensor) -> Tensor:
    """What transformers computes for a module that was not sparse."""
    if implementation_of(module) == NAME:
        return registered_function(_OTHERWISE)(module, *arguments)
    kind = class_before(module) if isinstance(module, SparseExperts) else type(module)
    found: Tensor = kind.forward(module, *arguments)
    return found


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What configurations with `experts_implementation="was"` compute by: sparse where `sparsify` has been, else as
    transformers does."""
    if isinstance(module, SparseExperts):
        return module.forward(hidden_states, top_k_index, top_k_weights)
    return _dense(module, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make `experts_forward` known to transformers."""
    register_function(NAME, experts_forward)


def begin_sparse(module: Any, norm: int, rule: TokenRule) -> None:
    """Turn an experts module into a sparse one, in place, whose experts keep every channel until they are given
    numbers. Nothing happens to one that is sparse already."""
    if isinstance(module, SparseExperts):
        return
    for name in weight_names(module):
        if is_quantized(module, name):
            weight = getattr(module, f"{name}_codes")
            size = weight.shape[:2]
        else:
            weight = weight_of(module, name)
            size = weight.shape[0], weight.shape[2]
        device = weight.device if not weight.is_meta else torch.device("cpu")
        module.register_buffer(
            f"was_norms_{name}", torch.zeros(size, dtype=torch.float32, device=device), persistent=False
        )
        module.register_buffer(
            f"was_threshold_{name}", torch.full(size, -1.0, dtype=torch.float32, device=device), persistent=False
        )
        module.register_buffer(f"was_counts_{name}", None, persistent=False)
    module.was_entries, module.was_norm, module.was_rule = {}, norm, rule
    swap_class(module, with_mixin(SparseExperts, type(module)))


def end_sparse(module: Any) -> None:
    """Undo `begin_sparse`."""
    for name in weight_names(module):
        for kind in ("norms", "threshold", "counts"):
            delattr(module, f"was_{kind}_{name}")
    for name in ("was_entries", "was_norm", "was_rule"):
        delattr(module, name)
    swap_class(module, class_before(module))


def sparse_experts_modules(model: nn.Module) -> dict[str, Any]:
    """The modules of a model that hold sparse experts, by the qualified name that they have now."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseExperts)}

"""`QuantizedExperts`: experts whose 3-D weights are held as rows of int8 or int4.

`make_quantized_expert` takes the matrices of a parameter one by one; with the last of them the Parameter goes, and
codes, scales and groups of all experts are buffers, named after it, that a state dict holds. The parameter's name is
still there to be read: it is dequantised anew each time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.experts import apply_gate
from was_fx.kernels.linear import quantized_experts
from was_fx.kernels.quantized.rows import QuantizedRows, expert_rows
from was_fx.modules.class_swap import Swapped, swap_class, with_mixin
from was_fx.modules.experts import bias_of, weight_names, weighted

NAMES = ("codes", "scales", "groups")
_HELD = ("gate_up_proj", "up_proj", "down_proj")
# Pairs of a token and an expert that read their rows of codes by themselves.
_FEW = 128


class QuantizedExperts(Swapped):
    """What such experts have beyond the class that they were.

    Attributes:
        …_codes, …_scales, …_groups: of the E experts of a parameter, stacked, each as in `QuantizedRows`; buffers.
        was_like: an empty buffer of the dtype that the module computes in.
    """

    was_product = False
    was_fp32 = tuple(f"{name}_scales" for name in _HELD)

    was_like: Tensor

    def __getattr__(self, name: str) -> Any:
        if name in _HELD and f"{name}_codes" in self.__dict__["_buffers"]:
            return _dequantized(self, name)
        return super().__getattr__(name)  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of T tokens [T, K], their experts [T, c] and the weights of those [T, c]."""
        experts = top_k_index.reshape(-1)
        x = hidden_states
        if not x.is_cpu and experts.shape[0] > _FEW:
            found: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
            return found
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        up, down = weight_names(self)
        y = apply_gate(self, product(self, up, x, experts, None, None))
        y = product(self, down, y, experts, None, None)
        return weighted(self, y, top_k_index, top_k_weights).to(hidden_states.dtype)


def is_quantized(module: nn.Module, held: str) -> bool:
    """Whether the experts that a parameter held are quantised."""
    return isinstance(module, QuantizedExperts) and f"{held}_codes" in module._buffers  # type: ignore[attr-defined]


def rows_of(module: Any, held: str, expert: int) -> QuantizedRows:
    """The weight [N, K] of an expert: views."""
    codes, scales, groups = (getattr(module, f"{held}_{name}") for name in NAMES)
    return expert_rows(codes, scales, groups, expert)


def product(
    module: Any, held: str, x: Tensor, experts: Tensor, threshold: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """y [S, N] of x [R, K] by quantised experts."""
    bias = bias_of(module, held)
    bias = None if bias is None else bias.to(x.dtype)
    stacked = (getattr(module, f"{held}_{name}") for name in NAMES)
    return quantized_experts.call(x, *stacked, bias, threshold, experts, tokens)


@torch.inference_mode(False)
@torch.no_grad()
def make_quantized_expert(module: Any, held: str, expert: int, rows: QuantizedRows, dtype: torch.dtype) -> None:
    """Take the quantised matrix of an expert; the last one of a parameter turns the module, in place.

    Args:
        module: of the experts.
        held: the parameter.
        expert: its place there.
        rows: its weight W [N, K].
        dtype: that the module computes in.
    """
    waiting: dict[int, QuantizedRows] = vars(module).setdefault("was_waiting", {}).setdefault(held, {})
    waiting[expert] = rows
    count = getattr(module, held).shape[0]
    if len(waiting) < count:
        return
    del module.was_waiting[held], module._parameters[held]
    for name in NAMES:
        parts = [getattr(waiting[each], name) for each in range(count)]
        module.register_buffer(f"{held}_{name}", None if parts[0] is None else torch.stack(parts))
    if not isinstance(module, QuantizedExperts):
        like = torch.empty(0, dtype=dtype, device=rows.codes.device)
        module.register_buffer("was_like", like, persistent=False)
        swap_class(module, with_mixin(QuantizedExperts, type(module)))
    if not module.was_waiting:
        del module.was_waiting


def _dequantized(module: Any, held: str) -> Tensor:
    count = module.__dict__["_buffers"][f"{held}_codes"].shape[0]
    rows = [rows_of(module, held, expert).dequantize(module.was_like.dtype) for expert in range(count)]
    whole = torch.stack(rows)  # [E, K, N]
    return whole if module.is_transposed else whole.mT

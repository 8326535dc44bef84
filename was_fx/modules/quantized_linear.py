"""`QuantizedLinear`: a Linear whose weight is held as rows of int8 or int4.

`make_quantized` turns a Linear into one in place. The weight Parameter goes; codes, scales and groups are buffers that
a state dict holds. `weight` is still there to be read, dequantised anew each time. A `QuantizedLinear` can be made
sparse as any other Linear.
"""

from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.linear import quantized_linear
from was_fx.kernels.quantized.fit import empty_int4
from was_fx.kernels.quantized.rows import INT8, QuantizedRows, check_group
from was_fx.modules.class_swap import Swapped, swap_class, with_mixin

NAMES = ("codes", "scales", "groups")


class QuantizedLinear(Swapped):
    """What a quantised Linear has beyond the class that it was.

    Attributes:
        codes, scales, groups: as in `QuantizedRows`; buffers.
        was_like: an empty buffer of the dtype that the module computes in.
    """

    was_fp32 = ("scales",)

    codes: Tensor
    scales: Tensor
    groups: Tensor | None
    bias: Tensor | None
    was_like: Tensor

    @property
    def was_rows(self) -> QuantizedRows:
        """The weight W [N, K]."""
        return QuantizedRows(self.codes, self.scales, self.groups)

    @property
    def weight(self) -> Tensor:
        """The weight as the class before held it, dequantised."""
        rows = self.was_rows.dequantize(self.was_like.dtype)
        return rows if self.was_input_major else rows.t()

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        return product(self, input, None, None)


def product(module: Any, x: Tensor, threshold: Tensor | None, tokens: Tensor | None) -> Tensor:
    """y of a `QuantizedLinear`, in the dtype of autocast where that is on."""
    bias = module.bias
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    return quantized_linear.call(x, module.was_rows, bias, threshold, tokens)


@torch.inference_mode(False)
def make_quantized(module: Any, rows: QuantizedRows, dtype: torch.dtype) -> None:
    """Turn a Linear into a quantised one, in place.

    Args:
        module: `nn.Linear`, a subclass, or `Conv1D`.
        rows: its weight W [N, K].
        dtype: that it computes in.
    """
    module._parameters.pop("weight", None)
    if module.bias is not None:
        module.bias.requires_grad_(False)
    for name in NAMES:
        module.register_buffer(name, getattr(rows, name))
    module.register_buffer("was_like", torch.empty(0, dtype=dtype, device=rows.codes.device), persistent=False)
    swap_class(module, with_mixin(QuantizedLinear, type(module)))


def empty_rows(name: str, module: Any, format: str) -> QuantizedRows:
    """Rows of a Linear that are to be loaded, on the device of its weight.

    Args:
        name: of the Linear, for errors.
        module: a Linear that is not quantised.
        format: "int8", or "int4-32" with another group.
    """
    weight = module.weight
    channels, outputs = weight.shape if hasattr(module, "nf") else weight.shape[::-1]
    return empty_rows_of(name, (outputs, channels), format, weight.device)


def empty_rows_of(name: str, shape: tuple[int, int], format: str, device: torch.device) -> QuantizedRows:
    """The same by the shape (N, K) of the weight.

    Raises:
        ValueError: the groups of int4 don't divide N.
    """
    outputs, channels = shape
    if format == INT8:
        padded = outputs + -outputs % 32
        codes = torch.empty(channels, padded, dtype=torch.int8, device=device)
        return QuantizedRows(codes, torch.empty(outputs, device=device, dtype=torch.float32), None)
    group = group_of(format)
    check_group(name, outputs, group)
    return empty_int4(outputs, channels, group, device)


def group_of(format: str) -> int:
    """The group that a name such as "int4-32" has."""
    return int(format.rpartition("-")[2])


def format_name(rows: QuantizedRows) -> str:
    """ "int8", or "int4-32" with another group."""
    if rows.groups is None:
        return INT8
    return f"{rows.format}-{rows.shape[0] // rows.groups.shape[1]}"


def weight_formats(model: nn.Module) -> dict[str, str]:
    """The format of each quantised Linear of a model, by qualified name."""
    return {name: format_name(module.was_rows) for name, module in quantized_linears(model).items()}


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """The quantised Linears of a model, sparse or not, by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}

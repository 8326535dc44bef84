"""`DenseLinear`: a Linear that no schedule names, by the kernel that reads it fastest on a CPU.

A model's head is the usual one: torch reads its weight at half the rate at which memory could give it.
"""

import torch
from torch import Tensor, nn

from was_fx.kernels.linear import dense_linear
from was_fx.modules.class_swap import Swapped, class_before, swap_class, with_mixin


class DenseLinear(Swapped):
    """What such a Linear has beyond the class that it was."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        if not input.is_cpu or torch.is_autocast_enabled("cpu"):
            return super().forward(input)  # type: ignore[misc]
        return dense_linear.call(input, self.weight, self.bias)


def make_fast(module: nn.Module) -> None:
    """Turn a plain `nn.Linear` into a `DenseLinear`, in place; anything else is left as it is."""
    if type(module).forward is nn.Linear.forward:
        swap_class(module, with_mixin(DenseLinear, type(module)))


def make_plain(model: nn.Module) -> None:
    """Undo `make_fast` in a whole model."""
    for module in model.modules():
        if isinstance(module, DenseLinear):
            swap_class(module, class_before(module))

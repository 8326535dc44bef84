"""Experts that a model holds together as 3-D parameters, each of their matrices seen as a Linear.

Classes of transformers that compute by its registry of experts functions hold two parameters: what goes up, [E, N, K]
or [E, K, N], with or without a gate, and what goes down. The matrix of expert 3 is called `….gate_up_proj[3]`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.experts import apply_gate, is_expert_parallel, is_registered
from was_fx.modules.weights import is_sharded
from was_fx.schedules.experts import member

_GATED, _PLAIN, _DOWN = "gate_up_proj", "up_proj", "down_proj"

# Given the parameter's name, the expert and its input x [P, K]; what it returns takes the place of x.
Look = Callable[[str, int, Tensor], Tensor | None]


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as plain 3-D parameters, all of them, that the registry computes."""
    if not is_registered(module) or is_expert_parallel(module):
        return False
    return all(_is_plain(getattr(module, name, None)) for name in weight_names(module))


def _is_plain(weight: object) -> bool:
    if not isinstance(weight, Tensor) or weight.dim() != 3 or is_sharded(weight):
        return False
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1


def weight_names(module: Any) -> tuple[str, str]:
    """The attributes that hold the weights of an experts module: of the product up, and of that down."""
    return (_GATED if module.has_gate else _PLAIN), _DOWN


def weight_of(module: Any, name: str) -> Tensor:
    """A weight as [E, N, K]: a view."""
    weight: Tensor = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def bias_of(module: Any, name: str) -> Tensor | None:
    """The biases [E, N] that go with a weight, or None."""
    return getattr(module, f"{name}_bias", None) if module.has_bias else None


def expert_names(path: str, module: Any) -> dict[str, tuple[str, int]]:
    """By qualified name of each expert's matrices: the parameter that holds it, and its place there.

    Args:
        path: qualified name of the experts module.
        module: it.
    """
    return {
        member(f"{path}.{name}" if path else name, expert): (name, expert)
        for name in weight_names(module)
        for expert in range(module.num_experts)
    }


def weighted(module: Any, y: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The output [T, H] of T tokens from those of their experts.

    Args:
        module: of the experts.
        y: [T · c, H], of each token's experts in the order of `index`.
        index: [T, c] integers; a number that is no expert of this rank counts for nothing.
        weights: [T, c].
    """
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    known = (index >= 0) & (index < module.num_experts)
    return (y.view(*index.shape, -1) * (weights * known)[..., None]).sum(1).to(y.dtype)


def run_by_hand(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, matrix: Callable[[str, int], Tensor], look: Look
) -> Tensor:
    """What an experts module computes, expert by expert: its meaning, with a look at what each matrix is multiplied by.

    Args:
        module: of the experts.
        x: [T, K].
        index: [T, c], the experts of each token.
        weights: [T, c].
        matrix: W [N, K] of a parameter's name and an expert.
        look: called before each product that has rows.

    Returns:
        [T, H].
    """

    def product(name: str, expert: int, rows: Tensor) -> Tensor:
        seen = look(name, expert, rows)
        bias = bias_of(module, name)
        own = None if bias is None else bias[expert]
        return torch.nn.functional.linear(rows if seen is None else seen, matrix(name, expert), own)

    up, down = weight_names(module)
    chosen = index.reshape(-1)
    y: Tensor | None = None
    for expert in [e for e in chosen.unique().tolist() if 0 <= e < module.num_experts]:
        pairs = (chosen == expert).nonzero()[:, 0]
        rows = x[pairs.div(index.shape[1], rounding_mode="floor")]
        found = product(down, expert, apply_gate(module, product(up, expert, rows)))
        y = found.new_zeros(len(chosen), found.shape[1]) if y is None else y
        y[pairs] = found
    return torch.zeros_like(x) if y is None else weighted(module, y, index, weights)


@contextmanager
def running_by_hand(module: nn.Module, matrix: Callable[[str, int], Tensor], look: Look) -> Iterator[None]:
    """Let a module's calls be `run_by_hand` while the context lasts, also where accelerate loads its weights."""
    own = vars(module)
    name = "_old_forward" if "_old_forward" in own else "forward"
    missing = object()
    before = own.get(name, missing)

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return run_by_hand(module, x, index, weights, matrix, look)

    own[name] = forward
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before

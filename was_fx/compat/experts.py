"""What transformers keeps of experts held as 3-D parameters, and the private names of it that are used.

Classes that its decorator `use_experts_implementation` has touched compute by any function of one registry. They all
call the same three tensors, and say of themselves how their weights lie. `tests/was_fx/compat` fails when one is gone.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

# What the decorator leaves on an experts module.
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def is_registered(module: Any) -> bool:
    """Whether a module's experts compute by transformers' registry of experts functions."""
    return all(hasattr(module, mark) for mark in _MARKS)


def is_expert_parallel(module: Any) -> bool:
    """Whether a rank holds only some of the experts of a module."""
    return bool(getattr(module, "_is_expert_parallel", False))


def apply_gate(module: Any, y: Tensor) -> Tensor:
    """What lies between the two products of an expert: y [S, I] or [S, 2 I] -> [S, I]."""
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)


def implementation_of(module: Any) -> str:
    """The name of the function that a model's configuration chooses for an experts module; "" if none."""
    return str(getattr(getattr(module, "config", None), "_experts_implementation", None) or "")


def register_function(name: str, function: Callable[..., Tensor]) -> None:
    """Let configurations choose `function(module, hidden_states, top_k_index, top_k_weights)` by a name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def registered_function(name: str) -> Callable[..., Tensor]:
    """A function of the registry."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS[name]
    return found

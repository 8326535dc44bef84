"""Private names of torch's graphs, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

from typing import Any

import torch
from torch.fx import Node


def is_higher_order(target: Any) -> bool:
    """Whether a node calls an operator that takes functions, such as `cond`."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def schema_of(target: Any) -> Any:
    """The schema of an operator (of its first overload), which says what it writes to; None of any other function."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def is_erased(node: Node) -> bool:
    """Whether a node is in its graph no longer."""
    return node._erased

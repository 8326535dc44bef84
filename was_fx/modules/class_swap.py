"""Give a module another class in place: it stays the same object, with its Parameters, hooks and place in the model."""

from functools import cache
from types import MethodType
from typing import Any

from torch import nn


class Swapped:
    """A mixin that stands before the class that a module had; `class_before` gives that class.

    Attributes:
        was_product: it computes x Wᵀ + b, as the class before it did.
        was_input_major: the weight Parameter is Wᵀ [K, N] (Conv1D), not W [N, K].
    """

    was_product = True

    was_input_major: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__, self.__dict__


def with_mixin(mixin: Any, kind: Any) -> Any:
    """The subclass (mixin, kind) of a Linear's class: `SparseLinear` of `Linear`, `SparseConv1D` of `Conv1D`, …"""
    return _made(mixin, kind)


@cache
def _made(mixin: Any, kind: Any) -> Any:
    prefix = mixin.__name__.removesuffix("Linear")
    attributes = {"__module__": kind.__module__, "was_input_major": not issubclass(kind, nn.Linear)}
    return type(f"{prefix}{kind.__name__}", (mixin, kind), attributes)


def class_before(module: Any) -> Any:
    """The class that a module had before its mixin."""
    return type(module).__bases__[1]


def swap_class(module: nn.Module, kind: Any) -> None:
    """Change the class of a module, and let what wraps its forward (accelerate's hooks, tensor parallelism) call the
    new one's."""
    had = type(module)
    module.__class__ = kind

    def ours(found: object) -> bool:
        return isinstance(found, MethodType) and found.__self__ is module and found.__func__ is had.forward

    own = module.__dict__
    present = MethodType(kind.forward, module)
    for name in ("forward", "_old_forward"):
        if ours(own.get(name)):
            own[name] = present
        for cell in getattr(own.get(name), "__closure__", None) or ():
            if ours(cell.cell_contents):
                cell.cell_contents = present


def _rebuild(mixin: Any, kind: Any) -> Any:
    made = _made(mixin, kind)
    return made.__new__(made)

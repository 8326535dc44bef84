"""Give a module another class in place: it stays the same object, with its Parameters, hooks and place in the model."""

import re
from functools import cache
from types import MethodType
from typing import Any

from torch import nn


class Swapped:
    """A mixin that stands before the class that a module had; `class_before` gives that class.

    Attributes:
        was_product: a Linear computes x Wᵀ + b, as the class before it did.
        was_fp32: names of buffers that stay fp32, whatever dtype the model gets.
        was_input_major: the weight Parameter is Wᵀ [K, N] (Conv1D), not W [N, K].
    """

    was_product = True
    was_fp32: tuple[str, ...] = ()

    was_input_major: bool

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the module to another device, but keep in fp32 what must be, in another dtype too."""
        buffers: Any = self._buffers  # type: ignore[attr-defined]
        names = {name for kind in type(self).__mro__ for name in vars(kind).get("was_fp32", ())}
        kept = {name: buffers[name] for name in names if buffers.get(name) is not None}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept.items():
            now = buffers[name]
            if now.dtype != before.dtype and not now.is_meta:
                buffers[name] = before.to(now.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixins, kind = [], type(self)
        while issubclass(kind, Swapped):
            mixins.append(kind.__bases__[0])
            kind = kind.__bases__[1]
        return _rebuild, (kind, *mixins), self.__dict__


def with_mixin(mixin: Any, kind: Any) -> Any:
    """The subclass (mixin, kind) of a Linear's class: `SparseLinear` of `Linear`, `SparseConv1D` of `Conv1D`, …"""
    return _made(mixin, kind)


@cache
def _made(mixin: Any, kind: Any) -> Any:
    prefix = re.sub("(Linear|Embedding|Experts)$", "", mixin.__name__)
    attributes = {"__module__": kind.__module__, "was_input_major": not issubclass(kind, nn.Linear)}
    return type(f"{prefix}{kind.__name__}", (mixin, kind), attributes)


def class_before(module: Any) -> Any:
    """The class that a module had before its mixin. A class that another library made of ours since, as torch's
    parametrizations do, is made anew of that one."""
    return _without_mixin(type(module))


def _without_mixin(kind: Any) -> Any:
    if kind.__bases__[0] is not Swapped and "was_input_major" in vars(kind):
        return kind.__bases__[1]
    bases = tuple(_without_mixin(each) if issubclass(each, Swapped) else each for each in kind.__bases__)
    own = {name: each for name, each in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, own)


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


def _rebuild(kind: Any, *mixins: Any) -> Any:
    for mixin in reversed(mixins):
        kind = _made(mixin, kind)
    return kind.__new__(kind)

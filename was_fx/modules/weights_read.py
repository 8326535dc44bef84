"""Which weights a model multiplies by itself, without a call of the Linear that holds them.

A module that computes `self.dt_proj.weight @ x` has a Linear that is never called: whatever its forward is, nothing
comes of it. Such a Linear can't be made sparse, and stays as it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from was_fx.modules.linears import LinearModule


class _Watch(TorchFunctionMode):
    """Notes for which of some tensors a function of torch is called that makes a tensor of them."""

    def __init__(self, names: Mapping[int, list[str]]) -> None:
        super().__init__()
        self.names = names
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        made = func(*args, **given)
        if next(_tensors(made), None) is not None:  # it asks for no dtype, device or shape
            for each in _tensors([args, *given.values()]):
                self.found.update(self.names.get(id(each), ()))
        return made


@contextmanager
def noting_reads(linears: Mapping[str, LinearModule]) -> Iterator[set[str]]:
    """The names of the Linears whose weight is computed with while the context lasts, by whatever does it."""
    names: dict[int, list[str]] = {}
    for name, linear in linears.items():
        names.setdefault(id(linear.parameter), []).append(name)
    with _Watch(names) as watch:
        yield watch.found


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)

"""What ties a weight Parameter to a schedule's numbers.

A binding hangs on the Parameter object itself, so it is found by identity: whichever module was compiled, whatever
Dynamo calls its inputs, and however many models share one compiled graph. Its tensors are read at every call, so a
schedule's numbers can change without a recompilation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Binding:
    """One scheduled Linear.

    Attributes:
        name: qualified name of the Linear in the model that was sparsified.
        norms: channel norms g [K] fp32, of the whole weight if that is sharded over ranks.
        threshold: channel thresholds t [K] fp32, on the weight's device; of this rank's channels if they are sharded.
        counts: [2] int64, dropped channels and channels seen, while sparsity is observed.
    """

    name: str
    norms: Tensor
    threshold: Tensor
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.threshold.device)


@dataclass(eq=False)
class WeightState:
    """What was_fx knows of one weight.

    Attributes:
        stride: strides before the weight was moved (of this rank's part, if it is sharded).
        bindings: by qualified name; a weight that several Linears share has one for each.
    """

    stride: tuple[int, ...]
    bindings: dict[str, Binding] = field(default_factory=dict)


def bind(weight: Tensor, binding: Binding) -> None:
    """Attach a binding to a weight."""
    if not hasattr(weight, "_was"):
        weight._was = WeightState(local(weight).stride())  # type: ignore[attr-defined]
    weight._was.bindings[binding.name] = binding  # type: ignore[attr-defined]


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that tensor parallelism made a DTensor; any other weight itself."""
    # Not to_local(), which may give a view: what moves the part must move the DTensor's own.
    return getattr(weight, "_local_tensor", weight)


def state(weight: object) -> WeightState | None:
    """What is known of a weight; None when nothing binds it."""
    return getattr(weight, "_was", None)


def unbind(weight: Tensor) -> WeightState | None:
    """Forget all that is known of a weight, and return it."""
    known = state(weight)
    if known is not None:
        del weight._was  # type: ignore[attr-defined]
    return known


def bindings(weight: object) -> dict[str, Binding]:
    """The bindings of a weight by qualified name; empty for anything that has none."""
    known = state(weight)
    return known.bindings if known else {}


def resolve(weight: object, path: str | None) -> Binding | None:
    """The binding of a weight for the module at `path`, which may be relative to a sub-module or to a wrapper.

    Args:
        weight: a graph input.
        path: dotted path of the module that used it, as far as it is known.
    """
    found = bindings(weight)
    if len(found) <= 1:
        return next(iter(found.values()), None)
    if path in found:
        return found[path]
    matches = [b for name, b in found.items() if path and _ends_alike(name, path)]
    return matches[0] if len(matches) == 1 else None


def _ends_alike(name: str, path: str) -> bool:
    return name.endswith("." + path) or path.endswith("." + name)

"""Whether a model is still the one it was: its modules, parameters, buffers and hooks."""

from itertools import chain
from typing import Any

from torch import nn


class Structure:
    """A model as it is now. `is_unchanged` is for steps of a decode loop, so its loops are C's."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._tables: list[dict[str, Any]] = []
        for module in modules:
            self._tables += [module._modules, module._parameters, module._buffers]  # type: ignore[list-item]
        self._hooks = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._contents = self._identities()
        self._counts = list(map(len, self._hooks))

    def is_unchanged(self) -> bool:
        """Whether every module holds the same objects and has as many hooks as then."""
        return list(map(len, self._hooks)) == self._counts and self._identities() == self._contents

    def _identities(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._tables))))

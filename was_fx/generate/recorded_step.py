"""Decode steps on a CPU that are recorded once and repeated without Python."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from was_fx.generate.direct_step import has_python_hooks, numbers_of
from was_fx.generate.structure import Structure
from was_fx.kernels.record.program import Unsupported
from was_fx.kernels.record.recorder import Recording

log = logging.getLogger(__name__)

# Recordings of a generation that may differ from the one before, until none is tried any more.
_TRIES = 3


class RecordedStep:
    """What `DirectStep` is on a GPU: two steps are recorded, and where they are the same but for their token and
    position, all that follow are repeated by the recording. Every step's numbers come from a recording, the first two
    as well, for they differ from the modules' in the order of some sums: a text must not depend on when it was made.

    Attributes:
        declined: why steps run as they are; "" while they are recorded.
    """

    def __init__(self, model: nn.Module, cache: Any, look_every: int = 1) -> None:
        """
        Args:
            model: a model on the CPU.
            cache: the static cache of the generation.
            look_every: look for changes of the model at every so-many-th step.
        """
        self.declined = "a hook of the caller's must be called" if has_python_hooks(model) else ""
        self._model, self._cache = model, cache
        self._look_every, self._steps, self._tries = look_every, 0, _TRIES
        self._last: tuple[Recording, list[Any]] | None = None
        self._found: Recording | None = None
        self._structure: Structure | None = None

    def logits(self, changing: Sequence[Tensor]) -> Tensor | None:
        """Logits [B, 1, V] of a step with this token [B, 1] and position [B, 1]; None if it is not known how."""
        if self._found is None or self._structure is None:
            return None
        self._steps += 1
        changed = self._steps % self._look_every == 0 and not self._structure.is_unchanged()
        if changed or not self._found.run(*changing):
            self._found = self._structure = self._last = None
            return None
        return self._found.output.clone()

    def through(self, function: Callable[..., Tensor], changing: Sequence[Tensor]) -> Tensor:
        """Logits of a step through the model, which is recorded."""
        if self.declined:
            return function(*changing)
        counting = [*self._cache.layers, *self._model.modules()]
        before_it = numbers_of(counting)
        try:
            recording = Recording(function, changing)
            if not recording.run(*changing):
                recording.undo()
                raise Unsupported("a value that is not what it was when the step was recorded")
        except Unsupported as error:
            self.declined = str(error)
            log.info("decode steps are not recorded, because of %s", self.declined)
            for each, numbers in zip(counting, before_it, strict=True):
                vars(each).update(numbers)  # a cache's layers may count in Python
            return function(*changing)
        numbers = numbers_of(counting)
        before, self._last = self._last, (recording, numbers)
        if self._structure is None or not self._structure.is_unchanged():
            self._structure = Structure(self._model)
        elif before is not None and before[0].signature == recording.signature and before[1] == numbers:
            self._found = recording
        else:
            self._tries -= 1
            if not self._tries:
                self.declined = "steps that differ from one another"
                log.info("decode steps are not recorded any more, because of %s", self.declined)
        return recording.output.clone()

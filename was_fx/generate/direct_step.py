"""From a step of a generation to the next one's logits, past the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from was_fx.compile.cuda_graphs import Call, CudaGraphs, noting_calls
from was_fx.generate.structure import Structure


@dataclass(frozen=True)
class _Pattern:
    """How a step called its compiled graph: which inputs were the step's token and position, which output its logits.

    `state` are the numbers that the cache keeps in Python.
    """

    step: CudaGraphs
    inputs: tuple[Any, ...]
    places: tuple[int | None, ...]
    output: int
    state: list[Any]

    def repeats(self, other: "_Pattern") -> bool:
        """Whether the other step differed in nothing but its token and position."""
        ours, theirs = ((each.step, each.places, each.output, each.state) for each in (self, other))
        return ours == theirs and all(map(_same, self.inputs, other.inputs))


class DirectStep:
    """To find that nothing has changed takes Dynamo's guards, transformers and our own inputs 1 to 2 ms of Python per
    token, longer than the step of a small model. Within a generation nothing does change: once two steps have called
    one compiled graph with the same weights and cache, and left the cache's Python state alone, the graph is called
    directly. Should a module, a parameter, a buffer or a hook have changed all the same (a callback may do anything),
    the model is called again.
    """

    def __init__(self, model: nn.Module, cache: Any, look_every: int = 1) -> None:
        """
        Args:
            model: a sparsified model.
            cache: the static cache of the generation.
            look_every: look for changes at every so-many-th step.
        """
        self._model, self._cache = model, cache
        self._look_every, self._steps = look_every, 0
        self._last: _Pattern | None = None
        self._found: _Pattern | None = None
        self._structure: Structure | None = None
        self._replay: Callable[[Sequence[Any]], Any] | None = None

    def logits(self, changing: Sequence[Tensor]) -> Tensor | None:
        """Logits [B, 1, V] of a step with this token [B, 1] and position [B, 1]; None if it is not known how."""
        if self._found is None or self._structure is None:
            return None
        self._steps += 1
        look = self._steps % self._look_every == 0
        if look and not self._structure.is_unchanged():
            self._found = self._structure = self._last = self._replay = None
            return None
        inputs = list(self._found.inputs)
        for place, each in zip(self._found.places, changing, strict=True):
            if place is not None:
                inputs[place] = each
        if self._replay is not None and not look:
            outputs = self._replay(inputs)
        else:
            outputs = self._found.step(*inputs)
            if self._look_every > 1:
                self._replay = self._found.step.replaying(inputs)
        result: Tensor = outputs[self._found.output]
        return result

    def through(self, function: Callable[..., Tensor], changing: Sequence[Tensor]) -> Tensor:
        """Logits of a step through the model, from which is learned how to go past it."""
        with noting_calls() as calls:
            logits = function(*changing)
        self.learn(calls, changing, logits)
        return logits

    def learn(self, calls: Sequence[Call], changing: Sequence[Tensor], logits: Tensor) -> None:
        """Note what a step through the model called."""
        before, self._last = self._last, None
        if len(calls) != 1:
            return
        step, inputs, outputs = calls[0].step, list(calls[0].inputs), calls[0].outputs
        places = tuple(next((i for i, given in enumerate(inputs) if given is each), None) for each in changing)
        output = next((i for i, given in enumerate(outputs) if given is logits), None)
        if places[0] is None or output is None:
            return
        for place in places:
            if place is not None:
                inputs[place] = None
        self._last = _Pattern(step, tuple(inputs), places, output, numbers_of(self._cache.layers))
        if self._structure is None or not self._structure.is_unchanged():
            self._structure = None if has_python_hooks(self._model) else Structure(self._model)
        elif before is not None and self._last.repeats(before):
            self._found, self._replay = self._last, None


def has_python_hooks(model: nn.Module) -> bool:
    """Whether someone's hooks would be passed by: any but those that decide which tokens are sparse."""
    return any(
        not getattr(hook, "__module__", "").startswith("was_fx.")
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    )


def numbers_of(objects: Iterable[Any]) -> list[Any]:
    """The numbers among the attributes of objects, which decide what they do."""
    return [{name: item for name, item in vars(each).items() if isinstance(item, int | float)} for each in objects]


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | float) and one == other)

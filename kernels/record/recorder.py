"""Records what a function does with tensors on a CPU, as a `Program` that does it again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.parts.private_names import (
    READ_VALUE,
    DispatchMode,
    operator_arguments,
    operator_name,
    storage_id,
    tree_leaves,
    tree_map,
)
from was_fx.kernels.record.program import Program, Step, Unsupported, View
from was_fx.kernels.record.translate import LINEARS, translate

aten = torch.ops.aten

_ALIGNMENT = 64
# What they give depends on nothing but the shape of what they are given.
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
# Values of tensors that are read into Python.
_READ = (READ_VALUE,)
# Doing it twice is doing it once. A copy may be of what was read from its target, such as a window that moves on.
_IDEMPOTENT = (aten.index_copy_.default, aten.index_put_.default, aten.fill_.Scalar)


@dataclass
class _Call:
    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    out: Any

    @cached_property
    def read(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return _tensors((self.arguments, self.keywords))

    @cached_property
    def storages_read(self) -> set[int]:
        return set(map(storage_of, self.read))

    @cached_property
    def storages_given(self) -> set[int]:
        return set(map(storage_of, _tensors(self.out)))

    @cached_property
    def written(self) -> list[Tensor]:
        """The arguments that it changes in place."""
        schema = list(operator_arguments(self.operator))
        given = [*zip(schema, self.arguments, strict=False)]
        given += [(each, self.keywords[each.name]) for each in schema if each.name in self.keywords]
        return _tensors([value for each, value in given if each.alias_info is not None and each.alias_info.is_write])


class _Recorder(DispatchMode):
    """Notes every call of an operator with what it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        call = _Call(operator, arguments, keywords or {}, None)
        if operator not in _IDEMPOTENT:
            self._before += [(each, each.clone()) for each in call.written]
        call.out = operator(*call.arguments, **call.keywords)
        self.calls.append(call)
        return call.out

    def undo(self) -> None:
        """Give what was changed, other than by overwriting, the values it had."""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)


class Recording:
    """A function and its program.

    Attributes:
        inputs: the tensors that `run` reads anew each time.
        output: what the function gave, written anew by `run`.
        program: what `run` carries out.
        signature: equal for two recordings that do the same with the same memory, inputs apart.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """
        Args:
            function: called once, with copies of `inputs`; what else it reads and changes is taken to lie where it
                lies now for as long as this is used. What it changes other than by overwriting is undone.
            inputs: tensors on the CPU; their values may be others for each run, their shapes may not.

        Raises:
            Unsupported: something that it does can't be recorded. It has been called all the same.
        """
        self.inputs = [each.clone() for each in inputs]
        with _Recorder() as recorder:
            self.output = function(*self.inputs)
        recorder.undo()
        self.undo = recorder.undo  # for a caller whose first run did not end
        self.program, self.signature = _program(recorder.calls, self.inputs, self.output)

    def run(self, *inputs: Tensor) -> bool:
        """Do it again with other values of the inputs; False if a value that Python had read would be another: then
        nothing was done."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.program.run()


def _program(calls: Sequence[_Call], inputs: Sequence[Tensor], output: Tensor) -> tuple[Program, list[Any]]:
    storages = _Storages(calls, inputs, output)
    kept = _siblings_together([call for call in calls if storages.matters(call)])
    arena = _Arena(kept, storages)
    steps: list[Step] = []
    changed = False
    missing: set[int] = set()  # storages of results that no instruction writes, such as a layer norm's mean
    for call in kept:
        if call.storages_read & missing:
            raise Unsupported(f"{call.operator} reads a result that is not computed")
        if call.operator in _READ:
            if changed:
                raise Unsupported("a value is read into Python after something was changed")
            (tensor,) = call.read
            steps.append(Step("expect", None, [View(arena.place(tensor))], (1,), float(call.out)))
            continue
        arguments, keywords, out = arena.place_all((call.arguments, call.keywords, call.out))
        made = translate(call.operator, arguments, keywords, out)
        steps += made
        if len(_tensors(out)) > 1:
            written = {step.out.tensor.data_ptr() for step in made if step.out is not None}
            results = zip(_tensors(call.out), _tensors(out), strict=True)
            missing |= {storage_of(each) for each, placed in results if placed.data_ptr() not in written}
        changed = changed or any(storage_of(each) in storages.outside for each in call.written)
    if storage_of(output) in missing:
        raise Unsupported("the result is one that is not computed")
    names = {storage_of(arena.memory): "arena", storage_of(output): "output"}
    names |= {storage_of(each): f"input {i}" for i, each in enumerate(inputs)}
    signature = [_signature(step, names, storages) for step in steps]
    return Program(steps, [arena.memory, *inputs, output]), signature


def _signature(step: Step, names: dict[int, str], storages: "_Storages") -> Any:
    """What tells a step from another: constants by their values, other memory by where it is."""

    def of(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        key = storage_of(tensor)
        if key in names:
            where: Any = names[key], tensor.storage_offset()
        elif key in storages.outside:
            where = tensor.data_ptr()
        else:
            where = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return where, tensor.dtype, tuple(tensor.shape)

    views = [(of(view.tensor), view.strides or view.tensor.stride()) for view in (step.out, *step.inputs) if view]
    numbers = step.name, step.sizes, step.number, step.integers, step.group
    return numbers, views, [of(weight) for weight in step.weights]


def _siblings_together(calls: Sequence[_Call]) -> list[_Call]:
    """Linears of one input next to each other, where nothing between them changes it: their rows are read in one go."""
    ordered: list[_Call] = []
    last: int | None = None  # position of the Linear before
    for call in calls:
        place = len(ordered)
        if call.operator in LINEARS:
            same = last is not None and ordered[last].arguments[0] is call.arguments[0]
            if last is not None and same and not any(each.written for each in ordered[last + 1 :]):
                place = last + 1
            last = place
        ordered.insert(place, call)
    return ordered


class _Storages:
    """What becomes of memory in a step.

    Attributes:
        outside: storages that were there before, or are given back.
        passing: those that a step makes for itself, with other values each time.
    """

    def __init__(self, calls: Sequence[_Call], inputs: Sequence[Tensor], output: Tensor) -> None:
        changed = {storage_of(each) for call in calls for each in call.written}
        self._changing = {*map(storage_of, inputs), *changed}
        made: set[int] = set()
        for call in calls:
            fresh = call.storages_given - call.storages_read - made
            made |= fresh
            if self._depends(call):
                self._changing |= call.storages_given
                continue
            if fresh & changed and not operator_name(call.operator).startswith(("empty", "new_empty")):
                raise Unsupported(f"{call.operator} makes what is changed afterwards")
            if torch.Tag.nondeterministic_seeded in call.operator.tags:
                raise Unsupported(f"{call.operator} draws random numbers")
        inside = made - {storage_of(output)}
        self.passing = inside & self._changing
        self.outside = {storage_of(output)}.union(*(call.storages_read for call in calls)) - inside
        if storage_of(output) not in self._changing:
            raise Unsupported("the result does not depend on the inputs")

    def matters(self, call: _Call) -> bool:
        """Whether a call gives other values each time, and is not only another view of memory."""
        if not self._depends(call):
            return False
        return call.operator in _READ or bool(call.written) or not call.storages_given <= call.storages_read

    def _depends(self, call: _Call) -> bool:
        return bool(call.storages_read & self._changing) and operator_name(call.operator) not in _SHAPE_ONLY


class _Arena:
    """One piece of memory for all that a step makes for itself: what is used no more leaves its place to others, so
    that all of it stays in the processor's cache."""

    def __init__(self, calls: Sequence[_Call], storages: _Storages) -> None:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for i, call in enumerate(calls):
            for tensor in [*_tensors(call.out), *call.read]:
                key = storage_of(tensor)
                if key in storages.passing:
                    first.setdefault(key, i)
                    last[key] = i
                    sizes[key] = -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        ends: dict[int, list[int]] = {}
        for key, i in last.items():
            ends.setdefault(i, []).append(key)
        starts: dict[int, list[int]] = {}
        for key, i in first.items():
            starts.setdefault(i, []).append(key)
        self._offsets: dict[int, int] = {}
        free: list[tuple[int, int]] = []  # offset, size
        total = 0
        for i in range(len(calls)):
            for key in starts.get(i, ()):
                place = next((hole for hole in free if hole[1] >= sizes[key]), None)
                if place is None:
                    self._offsets[key] = total
                    total += sizes[key]
                else:
                    free.remove(place)
                    self._offsets[key] = place[0]
                    if place[1] > sizes[key]:
                        free.append((place[0] + sizes[key], place[1] - sizes[key]))
            for key in ends.get(i, ()):
                free = _joined([*free, (self._offsets[key], sizes[key])])
        self.memory = torch.zeros(total + _ALIGNMENT, dtype=torch.uint8)
        self._begin = -self.memory.data_ptr() % _ALIGNMENT

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor where a run has it."""
        offset = self._offsets.get(storage_of(tensor))
        if offset is None:
            return tensor
        begin = (self._begin + offset) // tensor.element_size() + tensor.storage_offset()
        placed = torch.empty(0, dtype=tensor.dtype)
        return placed.set_(self.memory.untyped_storage(), begin, tensor.shape, tensor.stride())

    def place_all(self, tree: Any) -> Any:
        return tree_map(lambda each: self.place(each) if isinstance(each, Tensor) else each, tree)


def _joined(holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring holes as one."""
    merged: list[tuple[int, int]] = []
    for offset, size in sorted(holes):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((offset, size))
    return merged


def storage_of(tensor: Tensor) -> int:
    return storage_id(tensor.untyped_storage())


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]

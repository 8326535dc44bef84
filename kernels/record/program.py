"""A recorded step as instructions for the C++ kernels: what CUDA graphs are to a GPU.

Python, the dispatcher and the start of threads cost a token of a small model more than its weights do. An `Instruction`
holds everything about one operation: addresses, sizes, strides. `was_run` carries all of a step out in one call, with
one team of threads (`kernels/cpu/program.inc`).
"""

import ctypes
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from was_fx.kernels.cpu.library import DTYPES as CPU_DTYPES
from was_fx.kernels.cpu.library import kind, library

# Most dimensions of a tensor, of those that can't be seen as one.
DIMS = 5

# The order is that of kernels.cpp.
OPERATIONS = (  # noqa: SIM905
    "copy neg abs relu square cube sqrt rsqrt reciprocal exp sigmoid silu tanh gelu gelu_tanh sin cos not "
    "add sub mul div maximum minimum lt le gt ge eq ne and or where "
    "sum mean amax softmax layer_norm index scatter matrices attention all_rows gather gather_int8 gather_int4 "
    "add_parts expect"
).split()
CODES = {name: code for code, name in enumerate(OPERATIONS)}
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float64,
)
# Operations of which every thread does a part, whatever their size.
LINEARS = ("all_rows", "gather", "gather_int8", "gather_int4")
# The formats of weights of `was_gather`, in its order.
_GATHERS = LINEARS[1:]
_SHARED = {"matrices", "attention", "expect", *LINEARS}
# Elements from which the others are shared too.
_MANY = 8192
_WIDE = (torch.int32, torch.int64, torch.float64)

_number, _pointer = ctypes.c_int64, ctypes.c_void_p


class Operand(ctypes.Structure):
    _fields_ = [("data", _pointer), ("dtype", _number), ("strides", _number * DIMS)]


class Weight(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("data", "bias", "threshold", "scales", "groups")] + [("group", _number)]


class Instruction(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("op", "inputs", "dims", "waits", "alone", "exact")),
        ("sizes", _number * DIMS),
        ("out", Operand),
        ("input", Operand * 4),
        ("number", ctypes.c_double),
        ("integers", _number * 2),
        ("before", _number),
        ("columns", _number),
        ("weight", Weight),
    ]


class Unsupported(Exception):  # noqa: N818
    """Something of a step can't be an instruction; the text says what."""


@dataclass(frozen=True)
class View:
    """A tensor as an operand: where in memory and how it lies there. `None` strides are those of the tensor."""

    tensor: Tensor
    strides: tuple[int, ...] | None = None


@dataclass
class Step:
    """One operation.

    Attributes:
        name: of `OPERATIONS`.
        out: what it writes; None for "expect".
        inputs: what it reads.
        sizes: of the dimensions that it goes over; those of `out` by default.
        number: a scalar of it.
        integers: two more.
        weights: data, bias, threshold, scales and groups of a Linear.
        group: outputs of a group of int4.
    """

    name: str
    out: View | None
    inputs: Sequence[View | None]
    sizes: tuple[int, ...]
    number: float = 0.0
    integers: tuple[int, int] = (0, 0)
    weights: Sequence[Tensor | None] = field(default_factory=tuple)
    group: int = 0

    def tensors(self) -> list[Tensor]:
        """Everything it reads."""
        read = [view.tensor for view in self.inputs if view is not None]
        return read + [weight for weight in self.weights if weight is not None]


def elementwise(name: str, out: Tensor, inputs: Sequence[Tensor], number: float = 0.0) -> Step:
    """An operation on each element; inputs are broadcast.

    Raises:
        Unsupported: the tensors have too many dimensions.
    """
    broadcast = [each.expand(out.shape) for each in inputs]
    sizes, strides = _merged(out.shape, [out.stride(), *(each.stride() for each in broadcast)])
    views = [View(each, stride) for each, stride in zip(inputs, strides[1:], strict=True)]
    return Step(name, View(out, strides[0]), views, sizes, number)


def _merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Fewest dimensions over which all tensors lie the same."""
    sizes: list[int] = []
    found: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(mine[-1] == each[d] * size for mine, each in zip(found, strides, strict=True)):
            sizes[-1] *= size
            for mine, each in zip(found, strides, strict=True):
                mine[-1] = each[d]
            continue
        sizes.append(size)
        for mine, each in zip(found, strides, strict=True):
            mine.append(each[d])
    if not sizes:
        return (1,), [(1,) for _ in strides]
    return tuple(sizes), [tuple(each) for each in found]


class Program:
    """Steps that are carried out in order, each time on the same memory.

    Attributes:
        held: tensors whose memory the instructions use; they must not be moved or freed.
    """

    def __init__(self, steps: Sequence[Step], held: Sequence[object]) -> None:
        """
        Args:
            steps: in the order in which they may be carried out one by one.
            held: what else must stay alive.

        Raises:
            Unsupported: a tensor has too many dimensions or a dtype of another kind.
        """
        steps = _in_parts(steps)
        self._instructions = (Instruction * len(steps))()
        self.held = [*held, *(each for step in steps for each in step.tensors())]
        self.held += [step.out.tensor for step in steps if step.out is not None]
        order = _Order()
        for step, instruction in zip(steps, self._instructions, strict=True):
            _fill(instruction, step)
            instruction.waits = order.waits(step, bool(instruction.alone))
        self._share_threads(steps)

    def _share_threads(self, steps: Sequence[Step]) -> None:
        """Siblings of one input are shared among the threads as if they were one Linear: each reads longer rows."""
        begin = 0
        while begin < len(steps):
            end = begin + 1
            if steps[begin].name in LINEARS:
                while end < len(steps) and self._continues(steps[begin], steps[end], end):
                    end += 1
                outputs = [0 if step.integers[0] else step.sizes[1] for step in steps[begin:end]]
                for i, instruction in enumerate(self._instructions[begin:end]):
                    instruction.before, instruction.columns = sum(outputs[:i]), sum(outputs)
            begin = end

    def _continues(self, first: Step, step: Step, place: int) -> bool:
        return step.name == first.name and step.sizes[2] == first.sizes[2] and not self._instructions[place].waits

    def part(self, names: Collection[str]) -> "Program":
        """The instructions of these names alone, to time them: what they compute means nothing."""
        found = [each for each in self._instructions if OPERATIONS[each.op] in names]
        part = Program((), self.held)
        part._instructions = (Instruction * len(found))(*found)
        return part

    def run(self) -> bool:
        """Whether every value was what it must be; if not, the rest was left undone."""
        loaded = library()
        assert loaded is not None  # nothing is recorded without
        count = len(self._instructions)
        return bool(loaded.was_run(kind(), self._instructions, count, torch.get_num_threads()) < 0)


def _in_parts(steps: Sequence[Step]) -> list[Step]:
    """The same, with a Linear of short rows as a product that writes the sums of its parts and what adds these.
    Siblings are added after all their products, so that threads wait once for them."""
    made: list[Step] = []
    ends: list[Step] = []  # of the siblings before
    memory: dict[tuple[int, ...], Tensor] = {}
    for step in steps:
        if ends and not _siblings(made[-1], step):
            made += ends
            ends = []
        parts = _parts(step)
        if not parts or step.out is None:
            made.append(step)
            continue
        tokens, outputs, _ = step.sizes
        room = 1 if tokens == 1 else 4 if tokens <= 4 else -(-tokens // 8) * 8  # `room_of`
        # Few pieces of memory, used again by the next, stay in the first caches.
        place = len(ends), parts, room, -(-outputs // 32) * 32
        sums = View(memory.setdefault(place, torch.empty(place[1:], dtype=torch.float32)), ())
        data, bias, threshold, scales, groups = step.weights
        product = replace(step, out=sums, integers=(parts, 0), weights=(data, None, threshold, scales, groups))
        made.append(product)
        weights = (None, bias, None, scales if step.name == "gather_int8" else None, None)
        ends.append(Step("add_parts", step.out, [sums], (tokens, outputs, parts), weights=weights))
    return made + ends


def _parts(step: Step) -> int:
    """Of how many parts the sums of a step are; 0 for what is no Linear in parts."""
    if step.name not in _GATHERS or step.inputs[0] is None:
        return 0
    loaded = library()
    assert loaded is not None  # nothing is recorded without
    dtype = CPU_DTYPES[step.inputs[0].tensor.dtype]
    return int(loaded.was_parts(dtype, _GATHERS.index(step.name), step.sizes[1]))


def _siblings(some: Step, other: Step) -> bool:
    """Whether two steps are Linears of one input and format."""
    if some.name != other.name or some.name not in LINEARS or some.sizes[2] != other.sizes[2]:
        return False
    mine, theirs = some.inputs[0], other.inputs[0]
    return mine is not None and theirs is not None and mine.tensor.data_ptr() == theirs.tensor.data_ptr()


def _fill(instruction: Instruction, step: Step) -> None:
    if len(step.sizes) > DIMS:
        raise Unsupported(f"{step.name} over {len(step.sizes)} dimensions (at most {DIMS})")
    instruction.op, instruction.inputs, instruction.dims = CODES[step.name], len(step.inputs), len(step.sizes)
    instruction.sizes[: len(step.sizes)] = step.sizes
    if step.out is not None:
        _fill_operand(instruction.out, step.out)
    for operand, view in zip(instruction.input, step.inputs, strict=False):
        if view is not None:
            _fill_operand(operand, view)
    views = [step.out, *step.inputs]
    instruction.exact = any(view is not None and view.tensor.dtype in _WIDE for view in views)
    instruction.alone = step.name not in _SHARED and math.prod(step.sizes) < _MANY
    instruction.number = step.number
    instruction.integers[:] = step.integers
    if step.weights:
        names = ("data", "bias", "threshold", "scales", "groups")
        for name, weight in zip(names, step.weights, strict=True):
            setattr(instruction.weight, name, None if weight is None else weight.data_ptr())
        instruction.weight.group = step.group


def _fill_operand(operand: Operand, view: View) -> None:
    tensor, strides = view.tensor, view.tensor.stride() if view.strides is None else view.strides
    if tensor.dtype not in DTYPES or not tensor.is_cpu:
        raise Unsupported(f"a tensor of {tensor.dtype} on {tensor.device}")
    if len(strides) > DIMS:
        raise Unsupported(f"a tensor of {len(strides)} dimensions (at most {DIMS})")
    operand.data, operand.dtype = tensor.data_ptr(), DTYPES.index(tensor.dtype)
    operand.strides[: len(strides)] = strides


class _Order:
    """Which steps must wait for all before them: those that meet memory that another thread may still be at."""

    def __init__(self) -> None:
        self._read: list[tuple[int, int]] = []
        self._written: list[tuple[int, int]] = []
        self._alone: bool | None = None

    def waits(self, step: Step, alone: bool) -> bool:
        reads = [_span(view.tensor) for view in step.inputs if view is not None]
        writes = [] if step.out is None else [_span(step.out.tensor)]
        same_thread = alone and self._alone is True
        needed = not same_thread and (
            _meet(reads, self._written) or _meet(writes, self._written) or _meet(writes, self._read)
        )
        if needed:
            self._read, self._written, self._alone = [], [], None
        # What one thread did alone is in order for that thread only as long as nothing of others lies between.
        self._alone = alone if self._alone is None else self._alone and alone
        self._read += reads
        self._written += writes
        return needed


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of what a tensor covers."""
    begin = tensor.data_ptr()
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + elements * tensor.element_size()


def _meet(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)

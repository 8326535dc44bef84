"""Replay a compiled decode step as a CUDA graph.

A step launches some hundred kernels of a few microseconds each, which Python can't keep up with. The first call with a
set of tensors runs as it is, the second is captured, the others are replays.

Weights, thresholds and whatever the step changes in place, a static cache above all, are captured where they are: a
call with another cache is another graph, and nothing goes stale, because a graph is only replayed for tensors at the
addresses and of the sizes it was captured with. All other inputs (the token, its position, a mask) are copied to where
the graph reads them; numbers, which Dynamo may pass as tensors without dimensions on the CPU, belong to the graph.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_fx.compat.dynamo import is_static_input
from was_fx.compat.tensors import version
from was_fx.kernels.ops.channel_threshold import channel_threshold_op
from was_fx.kernels.parts.devices import on
from was_fx.passes.graph.context import Context
from was_fx.passes.graph.matching import storage, written_storages

log = logging.getLogger(__name__)

# Graphs kept for one compiled step: one per cache in use. The one unused for longest is dropped first.
MAX_GRAPHS = 8


@dataclass(eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    lock: threading.Lock  # its inputs and outputs are one caller's at a time
    copied: list[Tensor]  # where the graph reads the inputs that move
    outputs: Sequence[Any]
    aliases: list[bool]  # outputs that are an input's memory

    def replayed(self, moving: list[Tensor]) -> list[Any]:
        """The outputs of a replay with these inputs in place of those that are copied."""
        with self.lock:
            torch._foreach_copy_(self.copied, moving)
            self.graph.replay()
            return [
                output.clone() if isinstance(output, Tensor) and not alias else output
                for output, alias in zip(self.outputs, self.aliases, strict=True)
            ]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a compiled step: what it was given, and what it returned."""

    step: "CudaGraphs"
    inputs: Sequence[Any]
    outputs: Sequence[Any]


_calls: ContextVar[list[Call] | None] = ContextVar("calls of compiled steps", default=None)


@contextlib.contextmanager
def noting_calls() -> Iterator[list[Call]]:
    """The calls of compiled steps made in this thread while the context lasts."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)
        outer = _calls.get()
        if outer is not None:
            outer.extend(calls)


class CudaGraphs:
    """`compiled`, captured and replayed.

    Attributes:
        captures: how many graphs were captured so far.
    """

    def __init__(
        self, compiled: Callable[..., Any], in_place: Collection[int], versioned: Collection[int] = ()
    ) -> None:
        """
        Args:
            compiled: takes tensors and ints, returns a tuple or list; runs on one CUDA device without a
                synchronisation.
            in_place: positions of the inputs that keep their address, or that the step writes to.
            versioned: positions of the inputs that the step reads something remembered of: of another version it is
                another graph.
        """
        self._compiled = compiled
        self._in_place = tuple(sorted(in_place))
        self._versioned = tuple(sorted(versioned))
        self._others: tuple[int, ...] | None = None  # positions of all other inputs
        self._device: torch.device | None = None
        self._graphs: OrderedDict[tuple[Any, ...], _Captured | None] = OrderedDict()
        self._lock = threading.Lock()
        self.captures = 0

    def __call__(self, *inputs: Any) -> Any:
        if self._device is None:
            devices = (each.device for each in inputs if isinstance(each, Tensor) and not _is_number(each))
            self._device = next(devices)
        with on(self._device):
            outputs = self._run(inputs)
        self._note(inputs, outputs)
        return outputs

    def replaying(self, inputs: Sequence[Any]) -> Callable[[Sequence[Any]], Any] | None:
        """What does a call with these inputs again, where nothing has changed but the contents of those that are
        copied: it doesn't look at the others, of which there are hundreds. None if no graph was captured for them."""
        key = self._key(inputs)
        with self._lock:
            found = self._graphs.get(key)
        device = self._device
        if found is None or device is None:
            return None

        def replay(inputs: Sequence[Any]) -> Any:
            with on(device):
                outputs = found.replayed(self._moving(inputs))
            self._note(inputs, outputs)
            return outputs

        return replay

    def _note(self, inputs: Sequence[Any], outputs: Any) -> None:
        calls = _calls.get()
        if calls is not None:
            calls.append(Call(self, inputs, outputs))

    def _run(self, inputs: Sequence[Any]) -> Any:
        key, moving = self._key(inputs), self._moving(inputs)
        if not all(each.is_contiguous() for each in moving):
            return self._compiled(*inputs)  # a copy has other strides than those it was compiled for
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = None
                if len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                return self._compiled(*inputs)
            self._graphs.move_to_end(key)
            found = self._graphs[key]
            if found is None:
                found = self._graphs[key] = self._capture(inputs, moving)
        return found.replayed(moving)

    def _moving(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The inputs that a graph doesn't read where they are."""
        others = map(inputs.__getitem__, self._others or ())
        return [each for each in others if isinstance(each, Tensor) and not _is_number(each)]

    def _key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What a graph depends on."""
        if self._others is None:
            self._others = tuple(sorted(set(range(len(inputs))) - set(self._in_place)))
        others = [inputs[position] for position in self._others]
        plain = [
            (each.item() if _is_number(each) else each.shape) if isinstance(each, Tensor) else each for each in others
        ]
        versions = map(version, map(inputs.__getitem__, self._versioned))
        # Hundreds of weights at every token: map, which loops in C.
        return (*map(Tensor.data_ptr, map(inputs.__getitem__, self._in_place)), *plain, *versions)

    def _capture(self, inputs: Sequence[Any], moving: list[Tensor]) -> _Captured:
        copied = [each.clone() for each in moving]
        places = iter(copied)
        fixed = list(inputs)
        for position in self._others or ():
            if isinstance(inputs[position], Tensor) and not _is_number(inputs[position]):
                fixed[position] = next(places)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Memory of its own, so that threads may replay graphs of different caches at the same time.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._compiled(*fixed)
        self.captures += 1
        log.info("captured CUDA graph %d of a decode step", self.captures)
        memory = {each.untyped_storage().data_ptr() for each in inputs if isinstance(each, Tensor)}
        aliases = [isinstance(each, Tensor) and each.untyped_storage().data_ptr() in memory for each in outputs]
        return _Captured(graph, threading.Lock(), copied, outputs, aliases)


def graphable(inputs: Sequence[Any]) -> bool:
    """Whether a step on these inputs can be captured: all tensors but numbers on one CUDA device, none of them sharded
    over ranks (a capture would hold their collectives), and no gradients asked for."""
    if any(hasattr(each, "placements") for each in inputs):
        return False
    devices = {each.device for each in inputs if isinstance(each, Tensor) and not _is_number(each)}
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and not torch.is_grad_enabled()


def _is_number(tensor: Tensor) -> bool:
    return tensor.dim() == 0 and tensor.device.type == "cpu"


def fixed_inputs(context: Context) -> list[int]:
    """Positions of the inputs that stay where they are in memory from one call to the next: weights, buffers, and what
    the graph writes in place."""
    written = written_storages(context.module.graph)
    return [
        position
        for position, node in enumerate(context.module.graph.find_nodes(op="placeholder"))
        if storage(node) in written or isinstance(context.input_of(node), torch.nn.Parameter) or is_static_input(node)
    ]


def versioned_inputs(context: Context) -> list[int]:
    """Positions of the weights whose channel thresholds are remembered (`was::channel_threshold`)."""
    thresholds = context.module.graph.find_nodes(op="call_function", target=channel_threshold_op)
    return sorted({context.position(node.args[0]) for node in thresholds})


def has_state(context: Context) -> bool:
    """Whether the graph writes to an input, as with a static cache; a cache that grows is a new input each time."""
    written = written_storages(context.module.graph)
    return any(storage(node) in written for node in context.module.graph.find_nodes(op="placeholder"))

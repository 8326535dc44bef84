"""Time GPU work by replaying a CUDA graph of it, so that no launch from Python is part of any time."""

import statistics
from collections.abc import Callable, Sequence

import torch


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, in order; every call has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: Sequence[torch.cuda.CUDAGraph], calls: int, repetitions: int = 9) -> list[float]:
    """Median time of a call in each graph.

    Args:
        graphs: of `capture`; they take turns, so that a slow moment hits all of them.
        calls: in each graph.
        repetitions: replays of each that are timed, after one that is not.
    """
    times: list[list[float]] = [[] for _ in graphs]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repetition in range(repetitions + 1):
        for graph, found in zip(graphs, times, strict=True):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repetition:
                found.append(1e3 * start.elapsed_time(end) / calls)
    return [statistics.median(found) for found in times]

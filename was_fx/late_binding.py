"""A schedule given to `torch.compile(model, backend="was", options={"schedule": …})` on a dense model.

The backend sees a graph and its Parameters, not the model. Names come from the modules that the graph remembers. The
weights can't be moved while Dynamo compiles, because its guards have seen their strides; so the first graph runs
once as it is, on the reference, and moves them afterwards. Dynamo then traces again and finds a sparsified model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from was_fx.kernels.linear.layout import to_input_major, wants_input_major
from was_fx.passes.bindings import Binding, bind, bindings
from was_fx.passes.graph.context import Context, LinearSite, Options
from was_fx.passes.graph.recognize_linears import recognize_linears
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import channel_norms


def bind_graph(module: GraphModule, inputs: Sequence[Any], schedule: Schedule | str | Path) -> list[Tensor]:
    """Bind every Linear of the graph that `schedule` names.

    Returns:
        The weights that were bound now and have yet to move into input-major storage.

    Raises:
        ScheduleError: the names or shapes don't fit the graph, or its weights have another schedule already; lists
            every problem.
    """
    schedule = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    context = Context(module, list(inputs), Options())
    recognize_linears(context)
    sites = {site.path: site for site in context.sites if site.path and site.path in schedule.linears}
    problems = [f"{name}: no Linear of the graph has this name" for name in schedule.linears if name not in sites]
    for name, site in sites.items():
        expected, found = schedule.shapes[name], tuple(_weight(context, site).shape)
        if expected != found:
            problems.append(f"{name}: the schedule is for shape {expected}, the model has {found}")
        elif _bound_otherwise(context.input_of(site.weight), name, schedule):
            problems.append(f"{name}: the model has other thresholds already; was_fx.densify(model) takes them off")
    if problems:
        raise ScheduleError(
            "the schedule does not fit the compiled graph",
            problems,
            "Compile the whole model, or call was_fx.sparsify(model, schedule) first and then compile any part of it.",
        )
    weights = []
    for name, site in sites.items():
        weight = context.input_of(site.weight)
        if name in bindings(weight):
            continue
        norms = channel_norms(_weight(context, site), schedule.norm)
        thresholds = schedule.linears[name].channel_thresholds(norms)
        bind(weight, Binding(name, norms, thresholds.to(norms.device)))
        if not site.input_major and wants_input_major(weight) and not weight.t().is_contiguous():
            weights.append(weight)
    return weights


def run_once_then_move(run: Callable[..., Any], weights: Sequence[Tensor]) -> Callable[..., Any]:
    """`run`, which after its first call moves `weights` into input-major storage."""

    @torch.compiler.disable
    def call(*inputs: Any) -> Any:
        with torch.no_grad():
            result = run(*inputs)
        for weight in weights:
            to_input_major(weight)
        return result

    return call


def _bound_otherwise(weight: Tensor, name: str, schedule: Schedule) -> bool:
    binding = bindings(weight).get(name)
    if binding is None:
        return False
    return not torch.equal(binding.threshold, schedule.linears[name].channel_thresholds(binding.norms))


def _weight(context: Context, site: LinearSite) -> Tensor:
    """W [N, K], a view."""
    parameter = context.input_of(site.weight)
    return parameter.t() if site.input_major else parameter

"""Which kernel each Linear of a model would be served by, and why, without its weights.

The kernels are asked themselves (`choose`), with tensors that have no memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from was_fx.compat.tensors import without_memory
from was_fx.kernels.linear import dense_linear, quantized_experts, quantized_linear, sparse_experts, sparse_linear
from was_fx.kernels.parts.served import Choice
from was_fx.kernels.quantized.rows import QuantizedRows
from was_fx.modules.linears import (
    LinearModule,
    body_linears,
    dense_expert_parameters,
    experts_per_token,
    find_linears,
)
from was_fx.modules.quantized_linear import empty_rows_of
from was_fx.modules.text_decoder import TextDecoder
from was_fx.schedules.experts import group_of, groups
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.schedule_fit import fitted
from was_fx.sparse.weight_plan import Weights, planned

# Implementations that are right and read every row.
SLOW = ("dense_product", "dequantised_product", "grouped_product")


@dataclass(frozen=True)
class KernelUse:
    """Linears of one last name that one kernel serves for one reason.

    Attributes:
        name: their last name, such as "q_proj"; of experts, that of the parameter.
        linears: their qualified names.
        implementation: what serves a decode step: "cpu_gather", "gather_gemv", …; "" if the module is left as it is.
        weights: "bf16", …, "int8" or "int4-32".
        sparse: whether they drop channels.
        nominal: lowest and highest sparsity by the schedule; None without one.
        reason: why that kernel, or why they are dense.
        served: whether a kernel reads less than every row where `sparse`.
        problem: what can't be done and what to do; "" if nothing.
    """

    name: str
    linears: tuple[str, ...]
    implementation: str
    weights: str
    sparse: bool
    nominal: tuple[float, float] | None
    reason: str
    served: bool
    problem: str


def kernel_plan(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    schedule: Schedule | None = None,
    weights: Weights | None = None,
    allow_other_model: bool = False,
) -> list[KernelUse]:
    """What a decode step of one sequence would run by.

    Args:
        model: on any device, the meta device included.
        device: where it is to run.
        dtype: of its weights that are not quantised, and of activations.
        schedule: which Linears are sparse; None: those that are scheduled by default.
        weights: as for `was_fx.quantize`.
        allow_other_model: as for `sparsify`.

    Raises:
        ScheduleError: the schedule doesn't fit.
        ValueError: the model has no Linears, or `weights` is not valid for it.
    """
    linears = find_linears(model)
    if schedule is not None:
        schedule = fitted(model, schedule, linears, allow_other_model=allow_other_model)
    scheduled = set(body_linears(model)) if schedule is None else set(schedule.linears)
    formats = planned(model, linears, weights) if weights is not None else {}
    plain = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    found: dict[tuple, list[str]] = {}
    for group, names in groups(linears).items():
        linear, sparse = linears[names[0]], names[0] in scheduled
        format, problem = formats.get(names[0]), ""
        try:
            choice = serving(model, linear, device, dtype, sparse=sparse, format=format)
        except ValueError as error:  # int4 that a shape can't have
            choice, problem = Choice("", "it can't be quantised so", None), str(error)
        reason = choice.reason if sparse or problem else _why_dense(model, linear, schedule)
        key = (group.rpartition(".")[2], choice.name, format or plain, sparse and not problem, reason, problem)
        found.setdefault(key, []).append(group)
    uses = [
        KernelUse(
            name=name,
            linears=tuple(members),
            implementation=by,
            weights=format,
            sparse=sparse,
            nominal=_nominal(schedule, members) if sparse and schedule else None,
            reason=reason,
            served=not sparse or by not in SLOW,
            problem=problem,
        )
        for (name, by, format, sparse, reason, problem), members in found.items()
    ]
    return [*uses, *_not_linear(model, linears, plain)]


def serving(
    model: nn.Module,
    linear: LinearModule,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sparse: bool,
    format: str | None = None,
) -> Choice:
    """What serves a Linear for one token, by its shape alone.

    Args:
        model: that it is of.
        linear: W [N, K]; of experts any one.
        device: where it is to run.
        dtype: of activations, and of a weight that is not quantised.
        sparse: whether it drops channels.
        format: of its weight; None if it is not quantised.

    Raises:
        ValueError: the groups of int4 don't divide N.
    """
    outputs, channels = linear.shape
    count = 0 if linear.expert is None else linear.parameter.shape[0]
    with without_memory():
        x = torch.empty(1, channels, dtype=dtype, device=device)
        rows = None if format is None else empty_rows_of(linear.name, (outputs, channels), format, device)
        if count:
            return _serving_experts(x, outputs, count, min(experts_per_token(model) or 1, count), rows, sparse)
        if rows is not None:
            return quantized_linear.choose(x, [rows])
        by_columns = torch.empty(channels, outputs, dtype=dtype, device=device).t()
        if sparse:
            return sparse_linear.choose(x, [by_columns])
        weight = by_columns if linear.input_major else torch.empty(outputs, channels, dtype=dtype, device=device)
        return dense_linear.choose(x, weight)


def _serving_experts(
    x: torch.Tensor, outputs: int, count: int, chosen: int, rows: QuantizedRows | None, sparse: bool
) -> Choice:
    """Of `count` experts [N, K], `chosen` for the token; `rows` are those of one, if they are quantised."""
    experts = torch.empty(chosen, dtype=torch.int64, device=x.device)
    if rows is not None:
        codes, scales = rows.codes.expand(count, -1, -1), rows.scales.expand(count, -1)
        groups = None if rows.groups is None else rows.groups.expand(count, -1, -1, -1).contiguous()
        choice = quantized_experts.choose(x, codes.contiguous(), scales.contiguous(), groups, experts, None)
        return quantized_linear.choose(x, [rows]) if choice.name == "by_expert" else choice
    weight = torch.empty(count, x.shape[1], outputs, dtype=x.dtype, device=x.device).transpose(1, 2)
    threshold = torch.empty(count, x.shape[1], device=x.device) if sparse else None
    choice = sparse_experts.choose(x, weight, threshold, experts, None)
    if choice.name != "by_expert":
        return choice
    return sparse_linear.choose(x, [weight[0]]) if sparse else dense_linear.choose(x, weight[0])


def _why_dense(model: nn.Module, linear: LinearModule, schedule: Schedule | None) -> str:
    if schedule is not None and group_of(linear.name) in map(group_of, schedule.metadata.excluded):
        return "left out when the schedule was made"
    if linear.head:
        return "the output head, which stays dense unless it is scheduled"
    if not TextDecoder(model).holds(linear.name):
        return "outside of the text decoder: a decode step doesn't read it"
    return "not in the schedule"


def _nominal(schedule: Schedule, members: list[str]) -> tuple[float, float]:
    levels = [entry.sparsity for name, entry in schedule.linears.items() if group_of(name) in members]
    return min(levels), max(levels)


def _not_linear(model: nn.Module, linears: Mapping[str, LinearModule], plain: str) -> list[KernelUse]:
    """Matrices that no Linear holds, and that are multiplied all the same: experts in forms that are not known, and
    routers."""
    experts = dense_expert_parameters(model)
    read = {id(linear.parameter) for linear in linears.values()}
    decoder = TextDecoder(model)
    reasons: dict[tuple[str, str], list[str]] = {}
    for path, module in model.named_modules():
        for held, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{held}" if path else held
            if name in experts:
                reason = "held as one 3-D parameter in a form that was-fx doesn't know"
            elif parameter.dim() == 2 and id(parameter) not in read and not isinstance(module, nn.Embedding):
                reason = f"held by {type(module).__name__}, which is no Linear"
            else:
                continue
            if decoder.holds(name):
                short = held if held != "weight" else path.rpartition(".")[2]
                reasons.setdefault((short, reason), []).append(name)
    return [
        KernelUse(short, tuple(names), "", plain, False, None, reason, True, "")
        for (short, reason), names in reasons.items()
    ]

"""`sparsify` and `densify`: put a schedule on a model in place, and take it off again."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compilation import compile_call
from was_fx.compile.backend import BackendOptions, Executor, has_compiler, mode_options, register
from was_fx.generate.decode_loop import restore_generate, use_decode
from was_fx.kernels.linear.layout import restore, to_input_major, wants_input_major
from was_fx.modules.linears import LinearModule, body_linears, find_linears
from was_fx.offloading import DroppingHooks
from was_fx.passes.bindings import Binding, bind, bindings, local, unbind
from was_fx.passes.graph.context import Prefill
from was_fx.schedules.files.fingerprint import fingerprint, fingerprint_without_weights
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse import saving
from was_fx.sparse.placement import (
    is_offloaded,
    is_sharded,
    own_channels,
    rearrange,
    trace_through_devices,
    whole_channel_norms,
)


@dataclass(eq=False)
class SparseState:
    """What `sparsify` leaves on a model.

    Attributes:
        schedule: the schedule in force.
        options: the backend options the model is compiled with.
        compiled_before: the model's compiled call before `sparsify`.
        requires_grad: the flag of each parameter before `sparsify`.
        restore_hooks: puts back accelerate's hooks, if the model has any.
        dropping: the hooks that drop channels where weights are offloaded and nothing can be compiled.
    """

    schedule: Schedule
    options: BackendOptions
    compiled_before: Callable[..., Any] | None
    requires_grad: dict[str, bool]
    restore_hooks: Callable[[], None]
    dropping: DroppingHooks | None = None


def sparsify(
    model: nn.Module,
    schedule: Schedule | str | Path,
    *,
    prefill: Prefill = "dense",
    executor: Executor | None = None,
    disable: Sequence[str] = (),
    mode: str | None = None,
    allow_other_model: bool = False,
) -> nn.Module:
    """Make `model` decode sparsely by `schedule`, in place.

    The model keeps its class, its state_dict and `generate()`, which on a GPU uses a static cache and the loop of
    `was_fx.decode` where its arguments don't say otherwise. Its weights are moved one by one into input-major
    storage, and its call is compiled with the backend "was" when it first runs. On a model that is sparsified
    already, only the numbers change; with the same options nothing is compiled again.

    A model that `device_map=` spread over devices, or `tp_plan=` over ranks, may be given as it is; with weights that
    are offloaded to CPU memory or disk it gives the same results, but nothing is compiled or faster.

    Args:
        model: a causal LM of transformers, on its device and in its dtype. Its parameters stop requiring grad.
        schedule: a `Schedule` or the path of one.
        prefill: which tokens of a prompt are sparse: "dense" none; "sparse" all but the first 1 % (WAS);
            "half" the last half (TEAL); "all" every one. Decode steps are always sparse.
        executor: "inductor", or "eager" to run the rewritten graph node by node. By default Inductor, unless the
            model is on a CPU without a C++ compiler.
        disable: names of optional passes to leave out.
        mode: a mode of `torch.compile`, such as "max-autotune-no-cudagraphs". In every mode, decode steps on a GPU
            with a static cache are replayed as CUDA graphs.
        allow_other_model: accept a schedule whose fingerprint is another model's, if names and shapes fit.

    Returns:
        The same model.

    Raises:
        ScheduleError: the schedule doesn't fit this model; lists every problem.
        ValueError: the model has no Linears, or an argument is not valid.
    """
    register()
    schedule = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    linears = find_linears(model)
    weight = next(iter(linears.values())).parameter
    executor, on_gpu = executor or _default_executor(weight), weight.is_cuda
    raw = {"prefill": prefill, "executor": executor, "disable": tuple(disable), **mode_options(mode)}
    options = BackendOptions.parse(raw)
    check_schedule(model, schedule, linears, allow_other_model=allow_other_model)
    known = sparse_state(model)
    if known and (
        known.dropping or set(schedule.linears) != set(known.schedule.linears) or schedule.norm != known.schedule.norm
    ):
        densify(model)  # other weights to move, or other channel norms
        known = None
    scheduled = {name: linears[name] for name in schedule.linears}
    if known is None:
        compiled_before = model._compiled_call_impl
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        if any(is_offloaded(parameter) for parameter in model.parameters()):
            hooks = DroppingHooks(model, scheduled, schedule, options.passes)
            model._was_state = SparseState(schedule, options, compiled_before, flags, lambda: None, hooks)  # type: ignore[assignment]
            saving.attach(model)
            return model
        _move(scheduled, schedule)
        restore_hooks = trace_through_devices(model)
        model.requires_grad_(False)
    else:
        compiled_before, flags, restore_hooks = known.compiled_before, known.requires_grad, known.restore_hooks
    set_thresholds(scheduled, schedule)
    if known is None or known.options != options:
        as_they_are = on_gpu and prefill == "dense" and executor == "inductor"
        model._compiled_call_impl = compile_call(model._call_impl, raw, prompts_as_they_are=as_they_are)
    devices = {parameter.device for parameter in model.parameters()}
    if on_gpu and len(devices) == 1 and not is_sharded(weight):  # ranks that queue steps must not run apart
        use_decode(model)
    model._was_state = SparseState(schedule, options, compiled_before, flags, restore_hooks)  # type: ignore[assignment]
    saving.attach(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Undo `sparsify` in place: weights, strides, flags and the model's own compiled call are as before, bit by bit.

    Returns:
        The same model. A model that is not sparsified is returned as it is.
    """
    known = sparse_state(model)
    saving.detach(model)
    for parameter in model.parameters():
        _release(parameter)
    if known is not None and known.dropping is not None:
        known.dropping.remove()
        del model._was_state
    elif known is not None:
        known.restore_hooks()
        model._compiled_call_impl = known.compiled_before
        if known.compiled_before is None:
            del model._compiled_call_impl  # the class has the None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(known.requires_grad.get(name, parameter.requires_grad))
        restore_generate(model)
        del model._was_state
    return model


def sparse_state(model: nn.Module) -> SparseState | None:
    """What `sparsify` left on `model`; None for a dense model (a deep copy of a sparsified model is dense)."""
    known = getattr(model, "_was_state", None)
    if known is None:
        return None
    bound = known.dropping is not None or any(bindings(parameter) for parameter in model.parameters())
    return known if bound else None


def check_schedule(
    model: nn.Module,
    schedule: Schedule,
    linears: dict[str, LinearModule],
    *,
    allow_other_model: bool = False,
) -> None:
    """Check that `schedule` is one of `model`; see `Schedule.check`."""
    required = set(body_linears(model))
    shapes = {name: linear.shape for name, linear in linears.items() if name in required or name in schedule.linears}
    schedule.check(shapes, model_fingerprint(model, linears), allow_other_model=allow_other_model)


def model_fingerprint(model: nn.Module, linears: dict[str, LinearModule]) -> dict:
    """The fingerprint of a model: architecture, and shapes and a sample of the weights of all its Linears. Without the
    sample where weights are offloaded or sharded."""
    if any(is_offloaded(linear.parameter) or is_sharded(linear.parameter) for linear in linears.values()):
        return fingerprint_without_weights(type(model).__name__, {name: each.shape for name, each in linears.items()})
    return fingerprint(type(model).__name__, {name: linear.weight for name, linear in linears.items()})


def set_thresholds(linears: dict[str, LinearModule], schedule: Schedule) -> None:
    """Write the channel thresholds of `schedule` into the bindings of `linears`, in place."""
    for name, linear in linears.items():
        binding = bindings(linear.parameter)[name]
        binding.threshold.copy_(own_channels(schedule.linears[name].channel_thresholds(binding.norms), linear))


def _move(linears: dict[str, LinearModule], schedule: Schedule) -> None:
    """Bind each weight and move it into input-major storage; undone as a whole if any fails."""
    moved: list[Tensor] = []
    try:
        for name, linear in linears.items():
            norms = whole_channel_norms(linear, schedule.norm)
            parameter = linear.parameter
            moved.append(parameter)
            bind(parameter, Binding(name, norms, torch.empty_like(own_channels(norms, linear))))
            if not linear.input_major and wants_input_major(parameter):
                rearrange(parameter, to_input_major)
    except BaseException:
        for parameter in moved:
            _release(parameter)
        raise


def _release(parameter: Tensor) -> None:
    """Unbind a weight and give it back the strides it had, in a storage of its own."""
    before = unbind(parameter)
    if before is None:
        return
    part = local(parameter)
    alone = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    if part.stride() != before.stride or not alone:
        rearrange(parameter, functools.partial(restore, stride=before.stride))


def _default_executor(weight: Tensor) -> Executor:
    if weight.device.type != "cpu" or has_compiler():
        return "inductor"
    warnings.warn(
        "no C++ compiler found, so the rewritten graph runs node by node (executor='eager'), which is slower; "
        "install g++ or clang for full speed",
        stacklevel=3,
    )
    return "eager"

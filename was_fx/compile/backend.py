"""The Dynamo backend "was": the passes, then Inductor.

torch.compile(model, backend="was")                                   # a sparsified model
torch.compile(model, backend="was", options={"schedule": "llama.was.safetensors"})       # a dense one
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from was_fx.compat.dynamo import inductor, mode_options, register_backend
from was_fx.compile.cuda_graphs import CudaGraphs, fixed_inputs, graphable, has_state, versioned_inputs
from was_fx.compile.options import BackendOptions
from was_fx.kernels.linear.layout import to_input_major
from was_fx.modules.sparse_linear import SparseLinear
from was_fx.passes.graph.context import Context, module_classes
from was_fx.passes.graph.errors import RewriteError
from was_fx.passes.pipeline import run
from was_fx.schedules.errors import ScheduleError


def was(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile Dynamo's graph `module` for `inputs`; registered as the backend "was".

    Raises:
        ValueError: a bad option.
        ScheduleError: the option `schedule` doesn't fit the graph.
    """
    parsed = BackendOptions.parse({**mode_options(mode), **(options or {})})
    if parsed.schedule is not None and any(issubclass(kind, SparseLinear) for kind in module_classes(module.graph)):
        raise ScheduleError(
            "the option `schedule` is for a dense model",
            ["the model is sparsified already"],
            "Leave the option out, or call was_fx.densify(model) first.",
        )
    try:
        context = run(module, inputs, parsed.passes)
    except RewriteError as error:
        raise ScheduleError(
            str(error),
            [f"{name}: {problem}" for name, problem in error.linears.items()],
            "Compile the whole model, or call was_fx.sparsify(model, schedule) first and then compile any part of it.",
        ) from None
    moving = [each for each in context.weights if _is_to_move(inputs[each])]
    if moving:
        return _run_once_then_move(context.module.forward, moving)
    compiled = _lowered(context, parsed)
    if parsed.cuda_graphs and (context.decode or parsed.as_step) and has_state(context) and graphable(inputs):
        return CudaGraphs(compiled, fixed_inputs(context), versioned_inputs(context))
    return compiled


def register() -> None:
    """Make the name "was" known to torch.compile."""
    register_backend("was", "was_fx.compile.backend:was")


def _lowered(context: Context, options: BackendOptions) -> Callable[..., Any]:
    on_cpu = not any(isinstance(each, Tensor) and each.is_cuda for each in context.inputs)
    prompts = on_cpu if options.compile_prompts is None else options.compile_prompts
    compile_it = context.counts["sparse"] or options.as_step or prompts
    if options.lowering == "eager" or not compile_it:
        return context.module.forward
    # CUDA graphs are made by `CudaGraphs`: Inductor's own are set aside for steps that change a cache in place.
    patches = {**options.inductor, "triton.cudagraphs": False}
    if context.counts["listed"]:
        # The small kernels that Inductor makes of what lies between ours: those that don't depend on each other become
        # one, and each is launched while the one before it runs.
        for name, setting in (("combo_kernels", True), ("combo_kernels_autotune", 0), ("triton.enable_pdl", True)):
            patches.setdefault(name, setting)
    if torch.__version__ < "2.12" and on_cpu:
        # torch 2.11 writes this check into a vectorised CPU loop before the value that it checks.
        patches.setdefault("assert_indirect_indexing", False)
    return inductor(context.module, context.inputs, patches)


def _is_to_move(weight: Tensor) -> bool:
    return not weight.t().is_contiguous()


def _run_once_then_move(first: Callable[..., Any], weights: Sequence[int]) -> Callable[..., Any]:
    """The graph as it is, which after each call moves its inputs at the positions `weights` into input-major storage.
    They can't be moved while Dynamo compiles, because its guards have seen their strides; afterwards it traces again,
    for each model that shares this graph."""

    @torch.compiler.disable
    def call(*inputs: Any) -> Any:
        result = first(*inputs)
        for position in weights:
            to_input_major(inputs[position])
        return result

    return call

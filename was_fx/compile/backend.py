"""The Dynamo backend "was": the passes, then Inductor.

torch.compile(model, backend="was")                                   # a sparsified model
torch.compile(model, backend="was", options={"schedule": "llama.was.safetensors"})
"""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from was_fx.compile.cuda_graphs import CudaGraphs, graphable
from was_fx.passes.bindings import local
from was_fx.passes.extra_inputs import with_extra_inputs
from was_fx.passes.fixed_inputs import fixed_inputs, has_state
from was_fx.passes.graph.context import Options
from was_fx.passes.pipeline import Context, run

log = logging.getLogger(__name__)

Executor = Literal["inductor", "eager"]


@dataclass(frozen=True)
class BackendOptions:
    """The `options` of `torch.compile(..., backend="was")`.

    Attributes:
        prefill, observe, disable, lists: see `was_fx.passes.graph.context.Options`.
        cuda_graphs: replay decode steps on a GPU as CUDA graphs.
        compile_prompts: compile the graph of a dense prompt with Inductor too; None: not on a GPU, where that takes as
            long as the decode step's and saves little.
        executor: "inductor", or "eager" to run the rewritten graph node by node (debugging; no C++ compiler).
        schedule: a `Schedule` or the path of one, for a model that was not sparsified.
        inductor: any option of `torch._inductor.config`, by its own name.
    """

    prefill: str = "dense"
    observe: bool = False
    disable: tuple[str, ...] = ()
    lists: bool | None = None
    cuda_graphs: bool = True
    compile_prompts: bool | None = None
    executor: Executor = "inductor"
    schedule: Any = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "BackendOptions":
        """From the `options` of torch.compile.

        Raises:
            ValueError: an unknown option, or a bad value of one of our own; says which are known.
        """
        import torch._inductor

        own = {f.name for f in fields(cls)} - {"inductor"}
        known = set(torch._inductor.list_options())
        unknown = [key for key in options if key not in own | known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], own | known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f'backend "was" has no option {unknown[0]!r}{hint} '
                f"(its own are {', '.join(sorted(own))}; all others must be options of torch._inductor.config)"
            )
        inductor = {key: item for key, item in options.items() if key not in own}
        parsed = cls(**{key: item for key, item in options.items() if key in own}, inductor=inductor)
        if parsed.executor not in ("inductor", "eager"):
            raise ValueError(f"executor is {parsed.executor!r}; it must be 'inductor' or 'eager'")
        _ = parsed.passes  # checks prefill
        return parsed

    @property
    def passes(self) -> Options:
        """The part that the passes read."""
        disable = (self.disable,) if isinstance(self.disable, str) else tuple(self.disable)
        return Options(prefill=self.prefill, observe=self.observe, disable=disable, lists=self.lists)  # type: ignore[arg-type]


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
        RewriteError: a scheduled Linear can't be made sparse.
    """
    raise_recompile_limit()
    parsed = BackendOptions.parse({**mode_options(mode), **(options or {})})
    if parsed.schedule is not None:
        from was_fx.late_binding import bind_graph, run_once_then_move

        weights = bind_graph(module, inputs, parsed.schedule)
        if weights:
            context = run(module, inputs, parsed.passes)
            return run_once_then_move(with_extra_inputs(context.module.forward, list(context.extra)), weights)
    context = run(module, inputs, parsed.passes)
    compiled = _execute(context, parsed)
    _lay_out(context)  # after compilation, which still sees every weight where Dynamo saw it
    if parsed.cuda_graphs and context.phase == "decode" and has_state(context) and graphable(inputs):
        compiled = CudaGraphs(compiled, fixed_inputs(context))
    return with_extra_inputs(compiled, list(context.extra))


def mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor options that a mode of torch.compile, such as "reduce-overhead", stands for."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def _execute(context: Context, options: BackendOptions) -> Callable[..., Any]:
    on_cpu = not any(isinstance(each, torch.Tensor) and each.is_cuda for each in context.inputs)
    compile_it = context.counts["sparsified"] or (
        on_cpu if options.compile_prompts is None else options.compile_prompts
    )
    if options.executor == "eager" or not compile_it:
        return context.module.forward
    from torch._inductor.compile_fx import compile_fx

    extra = [node.meta["example_value"] for node in context.extra.values()]
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
    compiled: Any = compile_fx(context.module, [*context.inputs, *extra], config_patches=patches)
    return compiled


def _lay_out(context: Context) -> None:
    """Lay the weights of each merged call one after the other, and their thresholds too.

    Shapes and strides stay as they are, so no guard notices.
    """
    from was_fx.kernels.linear.layout import fuse_rows

    for group in context.siblings:
        weights = [context.input_of(weight) for weight, _ in group]
        like = weights[0]
        if like.is_cuda:
            continue  # its kernel takes the weights one by one
        same = all(w.dtype == like.dtype and w.device == like.device and w.t().is_contiguous() for w in weights)
        if any(local(weight) is not weight for weight in weights):
            continue  # shards of DTensors: Dynamo can't trace ones that share a storage
        if same and len({id(w) for w in weights}) == len(weights):
            fuse_rows(weights)
            fuse_rows([binding.threshold for _, binding in group])


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler for CPU code."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def raise_recompile_limit() -> None:
    """Let Dynamo keep 64 graphs per code object instead of 8, for the rest of the process.

    transformers runs every model through one code object, so all models, shapes and modes share the limit; past it
    Dynamo stops compiling and runs the model as it is, dense, with a warning only.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def register() -> None:
    """Make the name "was" known to torch.compile without an installed entry point, and without importing this file
    early (two registrations of one name are an error)."""
    from importlib.metadata import EntryPoint

    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault("was", EntryPoint("was", "was_fx.compile.backend:was", "torch_dynamo_backends"))


__all__ = ["BackendOptions", "has_compiler", "register", "was"]

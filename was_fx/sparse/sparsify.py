"""`sparsify` and `densify`: put a schedule on a model in place, and take it off again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import nn

from was_fx.compat.dynamo import mode_options
from was_fx.compile.backend import register
from was_fx.compile.options import BackendOptions, ModelLowering
from was_fx.generate.generation import check_lowering, use_own_generate, use_plain_generate
from was_fx.modules.dense_linear import make_fast, make_plain
from was_fx.modules.freshness import Freshness
from was_fx.modules.linears import find_linears
from was_fx.modules.quantized_linear import quantized_linears
from was_fx.modules.sparse_experts import register as register_experts_function
from was_fx.modules.sparse_linear import is_sparse, make_dense, set_numbers, sparse_modules
from was_fx.modules.token_rule import Prefill, TokenRule
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse import saving
from was_fx.sparse.in_place import give_back_strides, make_all_sparse
from was_fx.sparse.quantize import adopt_foreign, quantize
from was_fx.sparse.schedule_fit import fitted
from was_fx.sparse.state import SparseState, sparse_state, warn_of_other_formats
from was_fx.sparse.weight_plan import Weights, planned


def sparsify(
    model: nn.Module,
    schedule: Schedule | str | Path,
    *,
    weights: Weights | None = None,
    prefill: Prefill = "dense",
    lowering: ModelLowering | None = None,
    disable: Sequence[str] = (),
    mode: str | None = None,
    allow_other_model: bool = False,
) -> nn.Module:
    """Make `model` decode sparsely by `schedule`, in place.

    Every scheduled Linear becomes a `SparseLinear`: the same module with the same Parameters, whose class is a
    subclass of the one it had; the others become `DenseLinear`s, which compute the same. The model keeps its class and
    its state_dict, and is sparse on every path: eager, compiled by anyone, copied, pickled, moved, exported. Weights
    are moved one by one into input-major storage.

    On a GPU `generate()` compiles its decode steps with the backend "was" and replays them as CUDA graphs, with a
    static cache where its arguments don't say otherwise. On a CPU nothing is compiled unless asked for: the sparse
    kernels are as fast in eager mode.

    On a model that is sparsified already, only the numbers change; with the same options nothing is compiled again.

    Args:
        model: a causal LM of transformers, anywhere: on one device or several, offloaded, sharded over ranks.
        schedule: a `Schedule` or the path of one; one of a model's text-only class fits the multimodal one, and back.
        weights: quantise first: "int8", "int4", or formats by patterns of names, as for `quantize`.
        prefill: which tokens of a prompt are sparse: "dense" none; "sparse" all but the first 1 % of a sequence (WAS);
            "half" its last half (TEAL); "all" every one. Decode steps are always sparse.
        lowering: "inductor" compiles decode steps, on a CPU the whole model; "eager" compiles nothing; None: "inductor"
            on a GPU, "eager" elsewhere. "recorded": on a CPU `generate()` records two decode steps and then repeats
            them without Python, with a static cache (docs/cpu.md).
        disable: names of optional passes to leave out where something is compiled.
        mode: a mode of `torch.compile` for what is compiled, such as "max-autotune-no-cudagraphs".
        allow_other_model: accept a schedule whose fingerprint is another model's, if names and shapes fit.

    Returns:
        The same model.

    Raises:
        ScheduleError: the schedule doesn't fit this model; lists every problem.
        ValueError: the model has no Linears, its weights are quantised in a way that can't be read, they are sparse
            already as part of another model, or an argument is not valid; "recorded" for a model that is not on the
            CPU, or without the C++ kernels.

    Warns:
        UserWarning: the schedule was made with weights in other formats than the model's.
    """
    register()
    register_experts_function()
    schedule = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    adopt_foreign(model)
    linears = find_linears(model)
    rule = TokenRule(prefill)
    first = next(model.parameters(), None)
    check_lowering(lowering, None if first is None else first.device)
    options = BackendOptions.parse(
        {"disable": tuple(disable), "lowering": "eager" if lowering == "eager" else "inductor", **mode_options(mode)}
    )
    schedule = fitted(model, schedule, linears, allow_other_model=allow_other_model)
    if weights is not None and (sparse_state(model) is None or planned(model, linears, weights)):
        quantize(model, weights)
    warn_of_other_formats(model, schedule.metadata.weights, "the schedule")
    known = sparse_state(model)
    if known and (set(schedule.linears) != set(known.schedule.linears) or schedule.norm != known.schedule.norm):
        densify(model)  # other Linears, or other channel norms
        known = None
    scheduled = {name: linears[name] for name in schedule.linears}
    if known is None:
        shared = next((name for name, linear in scheduled.items() if is_sparse(linear)), None)
        if shared is not None:
            raise ValueError(
                f"{shared} is sparse already, by the schedule of another model that holds the same module; call "
                "was_fx.densify on that model first, or sparsify a copy of its modules"
            )
        state = SparseState(schedule, rule, Freshness(), strides=make_all_sparse(scheduled, schedule, rule))
        for name in linears.keys() - scheduled.keys():
            if linears[name].rows is None and linears[name].expert is None:
                make_fast(linears[name].module)
        state.watch(model)
        model._was_state = state  # type: ignore[assignment]
        state.freshness.remember(model)
        saving.attach(model)
    else:
        known.keep_sparse(model)
        known.schedule, known.rule.prefill = schedule, prefill
        for name, linear in scheduled.items():
            set_numbers(linear, schedule.linears[name])
    use_own_generate(model, options, lowering)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Undo `sparsify` in place: classes, weights and strides are as before, bit by bit. Quantised weights stay so.

    Returns:
        The same model. A model that is not sparsified is returned as it is.
    """
    state = sparse_state(model)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    linears = find_linears(model)
    moved = [name for name in state.strides if name in linears and is_sparse(linears[name])]
    for module in sparse_modules(model).values():
        make_dense(module)
    make_plain(model)
    for name in moved:
        give_back_strides(linears[name], state.strides[name])
    use_plain_generate(model)
    if not quantized_linears(model):
        saving.detach(model)
    del model._was_state
    return model


def prompts_treated(model: nn.Module, prefill: Prefill) -> AbstractContextManager[None]:
    """Treat a sparsified model's prompts as `prefill` says while the context lasts."""
    state = sparse_state(model)
    return nullcontext() if state is None else state.rule.treating_prompts(prefill)


def set_entries(model: nn.Module, schedule: Schedule) -> None:
    """Write the numbers of `schedule` into the sparse Linears of a model, and nothing else."""
    linears = find_linears(model)
    for name, entry in schedule.linears.items():
        set_numbers(linears[name], entry)

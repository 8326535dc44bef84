"""Private names of torch's compiler, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# What Dynamo writes for `F.linear` and `nn.Linear`.
linear_function: Any = torch._C._nn.linear

# Attributes in which a module of torch's holds the one that it wraps: compiled, checkpointed, sharded.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def source_name(node: Node) -> str:
    """Where a graph input comes from, such as "L['past_key_values'].layers[0].keys"; "" when it can't be told."""
    source = getattr(node, "_dynamo_source", None)  # set by Dynamo on every placeholder
    if source is None:
        argument = node.meta.get("grapharg")  # while the backend runs
        source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name  # a method until torch 2.12


def is_static_input(node: Node) -> bool:
    """Whether a graph input is marked as keeping its address: parameters, buffers, static caches."""
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def add_constant(module: GraphModule, name: str, tensor: Tensor) -> None:
    """Give Dynamo's graph module a tensor of its own, for `get_attr`. AOTAutograd asks each for a source."""
    from torch._dynamo.source import SyntheticLocalSource

    module.register_buffer(name, tensor)
    sources = getattr(module, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = SyntheticLocalSource(name)


def like_in_graph(tensor: Tensor, module: GraphModule) -> Tensor:
    """A fake tensor like `tensor`, in the fake mode of the module's inputs; itself where there is none."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder")])
    return mode.from_tensor(tensor, static_shapes=True) if mode else tensor


def inductor(module: GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a graph of Dynamo by Inductor, with its settings changed by `patches` for this graph."""
    from torch._inductor.compile_fx import compile_fx

    if torch.__version__ < "2.13":
        _register_ops(module)
    compiled: Any = compile_fx(module, list(inputs), config_patches=dict(patches))
    return compiled


def _register_ops(module: GraphModule) -> None:
    """Let Inductor know the ops of ours in a graph, as it would by itself where it meets one first.

    There it writes out the op's arguments for its log, and with them all that they were computed from, as often as each
    is used: of the head of a model of 32 blocks that does not end. torch 2.13 writes them when they are read.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for op in {node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}:
        if op.namespace == "was" and op not in lowerings:
            make_fallback(op, layout_constraint=tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False)


def inductor_options() -> set[str]:
    """Names of Inductor's settings."""
    import torch._inductor

    return set(torch._inductor.list_options())


def mode_options(mode: str | None) -> dict[str, Any]:
    """The settings of Inductor that a mode of torch.compile, such as "reduce-overhead", stands for.

    Raises:
        RuntimeError: there is no such mode.
    """
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def register_backend(name: str, location: str) -> None:
    """Make `name` known to torch.compile without an installed entry point, and without importing it early (two
    registrations of one name are an error)."""
    from importlib.metadata import EntryPoint

    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault(name, EntryPoint(name, location, "torch_dynamo_backends"))


def settings_for_models(*, late_hooks: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Settings of Dynamo under which a model of transformers is compiled and called; they hold within the context only.

    - 64 graphs per code object instead of 8: transformers runs every model through one, so that all models, schedules
      and shapes share them; past the limit a model runs uncompiled.
    - Floats are constants: otherwise each is an input under dynamic=True, and Inductor turns it down.
    - Hooks that are registered on a module later are seen, unless `late_hooks` is False: the guards on them cost time,
      and a dense model doesn't need them.
    """
    import torch._dynamo

    patches = {"recompile_limit": 64, "specialize_float": True, "skip_nnmodule_hook_guards": not late_hooks}
    return torch._dynamo.config.patch(patches)


def unsupported_errors() -> tuple[type[Exception], ...]:
    """What Dynamo and its backends raise for code that can't be compiled as one graph."""
    import torch._dynamo.exc

    return (torch._dynamo.exc.TorchDynamoException,)


def graphs_compiled() -> int:
    """How many graphs Dynamo has handed to backends in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def noting_graph_breaks() -> Iterator[list[str]]:
    """Dynamo's accounts of the graph breaks that happen while the context lasts; in the list when it has ended."""
    from torch._dynamo.utils import counters

    before = counters["graph_break"].copy()
    found: list[str] = []
    try:
        yield found
    finally:
        found += (counters["graph_break"] - before).keys()


def call_of(model: Any) -> Any:
    """What a module's call runs, its forward with its hooks, if it was not compiled."""
    return model._call_impl


def compiled_call(model: Any) -> Any:
    """What `model.compile()` made a module call in the place of its forward; None if it was not compiled."""
    return model._compiled_call_impl


def set_compiled_call(model: Any, call: Any) -> None:
    """Give a module another compiled call, or none."""
    if call is None:
        vars(model).pop("_compiled_call_impl", None)  # the class has a None
    else:
        model._compiled_call_impl = call


def inductor_cache() -> str:
    """The folder in which Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()

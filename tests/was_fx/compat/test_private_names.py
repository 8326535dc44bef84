"""Private names of torch and transformers: all stand in was_fx/compat, and each is still there.

A name is private if it, or a module it is in, begins with one underscore. An attribute or a string like that counts
as torch's or transformers' unless our own code defines it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.backends.registry
import torch._dynamo.exc
import torch._dynamo.source
import torch._dynamo.utils
import torch._inductor
import torch._inductor.compile_fx
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager
from transformers.generation import utils as generation
from transformers.integrations import moe as experts_registry
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer

from was_fx.compat import dynamo, graphs, saving, serving, tensors
from was_fx.compat import experts as our_experts
from was_fx.compat import generation as our_generation
from was_fx.compat import quantizers as our_quantizers
from was_fx.kernels.parts import private_names

ROOT = Path(__file__).parents[3]
TOPS = ("was_fx", "passes", "kernels", "schedules", "cli")
# The only files that may use private names.
HOMES = ("was_fx/compat/", "kernels/parts/private_names.py")

PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Documented, or for subclasses of nn.Module: its tables, and what moves a module's tensors.
ALLOWED = re.compile(r"_foreach_\w+|_modules|_parameters|_buffers|_forward_hooks|_forward_pre_hooks|_apply")
# Private names of others, and ours that are set on foreign objects.
OTHERS = {
    "_create_model": "lm-eval",
    "_data": "optimum-quanto",
    "_scale": "optimum-quanto",
    "_getframe": "Python's sys",
    "_hf_hook": "accelerate",
    "_old_forward": "accelerate",
    "_was_compiled": "was-fx",
    "_was_state": "was-fx",
}
# Functions that take the name of an attribute or of a key.
BY_STRING = ("getattr", "hasattr", "setattr", "delattr", ".pop", ".get", ".setdefault")
# Methods that transformers calls on a subclass, by these names.
OVERRIDDEN = {
    "_process_model_after_weight_loading": HfQuantizer,
    "_process_model_before_weight_loading": HfQuantizer,
}


def files(*tops: str) -> Iterator[Path]:
    for top in tops:
        yield from sorted((ROOT / top).rglob("*.py"))


def own_names() -> set[str]:
    """Private names that our code defines: functions, classes, variables, arguments, attributes of self."""
    found: set[str] = set()
    for path in files(*TOPS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.alias):
                found.add(node.asname or "")
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found.add(node.attr if isinstance(node.ctx, ast.Store) else "")
    return found - set(CHECKS)


def private_parts(dotted: str) -> list[str]:
    return [part for part in dotted.split(".") if PRIVATE.fullmatch(part)]


def foreign(dotted: str) -> bool:
    return dotted.split(".")[0] in ("torch", "transformers")


def private_names_in(path: Path, own: set[str]) -> set[tuple[str, int]]:
    """(name, line) of private names of others in a file."""
    found: set[tuple[str, int]] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names if foreign(alias.name) for part in private_parts(alias.name)]
        elif isinstance(node, ast.ImportFrom) and foreign(node.module or ""):
            names = private_parts(f"{node.module}." + ".".join(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            rooted = ast.unparse(node).startswith(("torch.", "transformers.", "nn."))
            names = [node.attr] if rooted or node.attr not in own else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_STRING):
            strings = [each.value for each in node.args if isinstance(each, ast.Constant)]
            names = [each for each in strings if isinstance(each, str) and PRIVATE.fullmatch(each) and each not in own]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Tuple):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            strings = [each.value for each in values if isinstance(each, ast.Constant)]
            names = [each for each in strings if isinstance(each, str) and PRIVATE.fullmatch(each) and each not in own]
        elif isinstance(node, ast.FunctionDef) and node.name in OVERRIDDEN:
            continue
        found |= {(name, node.lineno) for name in names if not ALLOWED.fullmatch(name) and name not in OTHERS}
    return found


def at_home(path: Path) -> bool:
    return path.relative_to(ROOT).as_posix().startswith(HOMES)


def test_private_names_stand_in_one_place():
    own = own_names()
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files(*TOPS)
        if not at_home(path)
        for name, line in sorted(private_names_in(path, own), key=lambda each: each[1])
    ]
    assert not found, "private names outside was_fx/compat:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo.utils", {"_dynamo"}),
        ("from torch._inductor import config", {"_inductor"}),
        ("from transformers.utils import _private", {"_private"}),
        ("import torch\ntorch._C.anything()", {"_C"}),
        ("model._compiled_call_impl = None", {"_compiled_call_impl"}),
        ("x = getattr(cache, '_is_user_defined', None)", {"_is_user_defined"}),
        ("vars(model).pop('_pad_token_tensor')", {"_pad_token_tensor"}),
        ("NAME = '_upload'", {"_upload"}),
        ("import torch\ntorch._foreach_add_([], 1)\nmodel._modules\nmodel.__class__\nself._mine", set()),
        ("import numpy\nfrom ours import _private", set()),
    ],
)
def test_what_is_looked_for_is_found(source, names, tmp_path):
    path = tmp_path / "some.py"
    path.write_text(source)
    assert {name for name, _ in private_names_in(path, {"_mine", "_private"} - names)} == names


# What was-fx needs of each, by the name; raises or is false when it is gone.


class Captured:
    """What Dynamo hands to a backend for a Linear whose input is a static buffer."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.linear: Any = None
        module = nn.Linear(3, 2)
        torch.compile(module, backend=self)(torch.zeros(1, 3))

    def __call__(self, graph, inputs):
        self.graph = graph
        self.inputs = {each.target: each for each in graph.graph.find_nodes(op="placeholder")}
        (self.linear,) = (each.target for each in graph.graph.nodes if each.op == "call_function")
        self.static = [dynamo.is_static_input(each) for each in self.inputs.values()]
        self.sources = [dynamo.source_name(each) for each in self.inputs.values()]
        dynamo.add_constant(graph, "was_constant", torch.zeros(3))
        fakes = [dynamo.like_in_graph(torch.zeros(3), graph)]
        self.fake = type(fakes[0]).__name__
        self.constants = dict(getattr(graph, "_param_name_to_source", None) or {})
        return graph.forward


@pytest.fixture(scope="module")
def captured() -> Captured:
    return Captured()


def dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def with_compiled_call() -> bool:
    module = nn.Linear(2, 2)
    before = dynamo.compiled_call(module)
    module.compile(backend="eager")
    made = dynamo.compiled_call(module)
    dynamo.set_compiled_call(module, None)
    gone = dynamo.compiled_call(module) is None and "_compiled_call_impl" not in vars(module)
    return before is None and made is not None and gone


def counts_versions() -> bool:
    x = torch.zeros(2)
    before = tensors.version(x), private_names.version(x)
    x.add_(1)
    with torch.inference_mode():
        made = torch.zeros(2)
    after = tensors.version(x), private_names.version(x)
    return after == (before[0] + 1, before[1] + 1) and tensors.version(made) == -1


def wraps_modules() -> bool:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

    compiled, checkpointed, sharded = dynamo.WRAPPED
    module = nn.Linear(2, 2)
    holders = getattr(torch.compile(module), compiled), getattr(checkpoint_wrapper(module), checkpointed)
    return all(each is module for each in holders) and sharded == FSDP_WRAPPED_MODULE


def knows_a_backward_pass() -> bool:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(tensors.in_backward()))
    x.sum().backward()
    return seen == [True] and not tensors.in_backward()


def tells_storages_apart() -> bool:
    x, y = torch.zeros(2, 2), torch.zeros(2, 2)
    apart = tensors.storage_id(x) != tensors.storage_id(y)
    same = tensors.storage_id(x) == tensors.storage_id(x[0]) == private_names.storage_id(x.untyped_storage())
    return apart and same


def makes_tensors_without_memory() -> bool:
    with tensors.without_memory():
        huge = torch.empty(1 << 30, 1 << 10, dtype=torch.bfloat16).t()
    return huge.is_cpu and huge.stride() == (1, 1 << 10)


def tells_what_watches() -> bool:
    x, plainly = torch.zeros(2), private_names.calls_plainly
    with torch.no_grad(), FakeTensorMode():
        watched = plainly(x)
    with torch.no_grad(), torch.device("cpu"):  # a mode of functions
        changed = plainly(x)
    transformed = []
    torch.func.vmap(lambda row: (transformed.append(plainly(x)), row)[1])(torch.zeros(2, 2))
    torch.jit.trace(lambda row: (transformed.append(plainly(row)), row)[1], x, check_trace=False)
    with_grad = plainly(x, torch.zeros(2, requires_grad=True))
    return plainly(x) and not (watched or changed or any(transformed) or with_grad)


def keeps_an_erased_node() -> bool:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    before = graphs.is_erased(node)
    graph.erase_node(node)
    return not before and graphs.is_erased(node)


def experts_marks() -> bool:
    """The decorator marks a module, and what lies between the products is the class's own."""

    @experts_registry.use_experts_implementation(is_transposed=True)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.act_fn = nn.ReLU()

        def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return x

    module = Experts(SimpleNamespace(_experts_implementation="eager"))
    y = our_experts.apply_gate(module, torch.tensor([[2.0, -1.0, 3.0, 5.0]]))
    return our_experts.is_registered(module) and y.tolist() == [[6.0, 0.0]] and bool(module.is_transposed)


def source_of(function: Any) -> str:
    import inspect

    return inspect.getsource(inspect.getmodule(function) or function)


def arguments_of(function: Any) -> set[str]:
    import inspect

    return set(inspect.signature(function).parameters)


CHECKS: dict[str, Callable[[Captured], object]] = {
    # torch
    "_C": lambda _: torch._C,
    "_nn": lambda found: torch._C._nn.linear is dynamo.linear_function is found.linear,
    "_BACKENDS": lambda _: isinstance(torch._dynamo.backends.registry._BACKENDS, dict),
    "_call_impl": lambda _: dynamo.call_of(nn.ReLU())(torch.tensor([-1.0, 2.0])).tolist() == [0, 2],
    "_functorch": lambda _: tells_what_watches(),
    "_get_tracing_state": lambda _: tells_what_watches(),
    "_len_torch_dispatch_stack": lambda _: tells_what_watches(),
    "_len_torch_function_stack": lambda _: tells_what_watches(),
    "_is_amx_tile_supported": lambda _: torch.cpu._is_amx_tile_supported() in (True, False),
    "_is_avx512_bf16_supported": lambda _: torch.cpu._is_avx512_bf16_supported() in (True, False),
    "_is_mkldnn_fp16_supported": lambda _: private_names.multiplies_natively(torch.float16) in (True, False),
    "_cdata": lambda _: tells_storages_apart(),
    "_local_scalar_dense": lambda _: private_names.READ_VALUE(torch.tensor(3)) == 3,
    "_python_dispatch": lambda _: hasattr(private_names.DispatchMode, "__torch_dispatch__"),
    "_pytree": lambda _: private_names.tree_leaves(([1], {"a": 2})) == [1, 2],
    "_scaled_dot_product_flash_attention_for_cpu": lambda _: callable(private_names.CPU_ATTENTION),
    "_softmax": lambda _: callable(private_names.SOFTMAX),
    "_checkpoint_wrapped_module": lambda _: wraps_modules(),
    "_compiled_call_impl": lambda _: with_compiled_call(),
    "_current_graph_task_id": lambda _: knows_a_backward_pass(),
    "_dynamo": lambda _: (
        torch._dynamo.config.recompile_limit,
        torch._dynamo.config.specialize_float in (True, False),
        torch._dynamo.config.skip_nnmodule_hook_guards in (True, False),
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.source.SyntheticLocalSource,
        torch._dynamo.utils.counters["stats"]["unique_graphs"]
        + 0 * torch._dynamo.utils.counters["graph_break"].total(),
    ),
    "_dynamo_source": lambda found: all(found.sources),
    "_dynamo_static_input_type": lambda found: found.static == [True, True, False] or sum(found.static) == 2,
    "_erased": lambda _: keeps_an_erased_node(),
    "_guards": lambda found: found.fake == "FakeTensor",
    "_inductor": lambda _: (
        "max_autotune" in dynamo.inductor_options() and dynamo.mode_options("max-autotune-no-cudagraphs"),
        torch._inductor.compile_fx.compile_fx,
        torch._inductor.lowering.lowerings,
        torch._inductor.lowering.make_fallback,
        torch._inductor.lowering.tag_to_layout_constraint,
        Path(dynamo.inductor_cache()).is_absolute(),
    ),
    "_local_tensor": lambda _: "_local_tensor" in dtensor().__slots__,
    "_library": lambda _: torch._library.utils.get_layout_constraint_tag,
    "_ops": lambda _: (
        graphs.is_higher_order(torch.ops.higher_order.cond) and graphs.schema_of(torch.ops.aten.add_).is_mutable
    ),
    "_param_name_to_source": lambda found: "was_constant" in found.constants or not found.constants,
    "_orig_mod": lambda _: wraps_modules(),
    "_fsdp_wrapped_module": lambda _: wraps_modules(),
    "_schema": lambda _: (
        graphs.schema_of(torch.ops.aten.add_.Tensor).arguments[0].alias_info.is_write
        and graphs.schema_of(torch.add) is None
    ),
    "_sleep": lambda _: callable(torch.cuda._sleep),
    "_subclasses": lambda _: makes_tensors_without_memory(),
    "_spec": lambda _: "_spec" in dtensor().__slots__,
    "_version": lambda _: counts_versions(),
    # transformers
    "_apply_gate": lambda _: experts_marks(),
    "_experts_implementation": lambda _: (
        our_experts.implementation_of(
            SimpleNamespace(config=transformers.MixtralConfig(experts_implementation="eager"))
        )
        == "eager"
    ),
    "_is_expert_parallel": lambda _: (
        not our_experts.is_expert_parallel(nn.Linear(1, 1)) and "EP sentinel" in source_of(experts_registry)
    ),
    "_attn_implementation": lambda _: (
        our_generation.attention_of(SimpleNamespace(config=transformers.LlamaConfig(attn_implementation="sdpa")))
        == "sdpa"
    ),
    "_load_model": lambda _: "self._load_model(" in source_of(ModelManager),
    "_load_processor": lambda _: "self._load_processor(" in source_of(ModelManager),
    "_commit_hash": lambda _: "_commit_hash" in source_of(transformers.PretrainedConfig),
    "_hf_peft_config_loaded": lambda _: (
        PreTrainedModel._hf_peft_config_loaded is False and not saving.saves_adapters_only(nn.Linear(1, 1))
    ),
    "_is_hf_initialized": lambda _: (
        "param_value._is_hf_initialized = True" in source_of(transformers.core_model_loading)
    ),
    "_is_stateful": lambda _: (
        our_generation.keeps_a_state(transformers.RwkvForCausalLM) and PreTrainedModel._is_stateful is False
    ),
    "_is_user_defined": lambda _: "_is_user_defined" in source_of(generation.GenerationMixin),
    "_name_or_path": lambda _: saving.origin(transformers.LlamaConfig(name_or_path="a/b"))[0] == "a/b",
    "_weight_conversions": lambda _: "_weight_conversions" in source_of(transformers.core_model_loading),
    "_is_quantized": lambda _: "_is_quantized" in source_of(transformers.configuration_utils),
    "_pad_token_tensor": lambda _: "_pad_token_tensor" in source_of(generation.GenerationMixin),
    "_upload_modified_files": lambda _: callable(getattr(PreTrainedModel, saving.UPLOAD)),
}
# Names without an underscore that are no part of a documented interface either.
UNDOCUMENTED: dict[str, Callable[[], object]] = {
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS": lambda: (
        callable(our_experts.registered_function("grouped_mm"))
        and "register" in our_experts.register_function.__code__.co_names
        and callable(experts_registry.ALL_EXPERTS_FUNCTIONS.register)
    ),
    "transformers.generation.utils.GENERATION_MODES_MAPPING": lambda: callable(
        our_generation.decoding_method(generation.GenerationMixin, GenerationConfig(), {})
    ),
    "transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES": lambda: (
        isinstance(quantizers.LOADING_ATTRIBUTES_CONFIG_TYPES, tuple)
        and "LOADING_ATTRIBUTES_CONFIG_TYPES" in our_quantizers.let_given_attributes_win.__code__.co_names
    ),
    "transformers.cli.serve.Serve": lambda: {"force_model", "host", "port", "log_level"} <= arguments_of(Serve),
    "transformers.utils.import_utils.is_serve_available": lambda: isinstance(serving.missing_for_server(), str),
    "transformers.cache_utils.StaticLayer": lambda: transformers.cache_utils.StaticLayer,
    **{
        f"{kind.__name__}.{name}": lambda kind=kind, name=name: callable(getattr(kind, name))
        for name, kind in OVERRIDDEN.items()
    },
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_private_name_is_still_there(name, captured):
    try:
        found = CHECKS[name](captured)
    except Exception as error:
        pytest.fail(f"{name} of torch {torch.__version__}, transformers {transformers.__version__} is gone: {error!r}")
    parts = found if isinstance(found, tuple) else (found,)
    assert all(each is not False and each is not None for each in parts), f"{name} is not what it was: {found}"


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_an_undocumented_name_is_still_there(name):
    assert UNDOCUMENTED[name](), f"{name} is gone"


def test_every_private_name_in_use_is_checked():
    own = own_names()
    used = {name for path in files(*TOPS) if at_home(path) for name, _ in private_names_in(path, own)}
    assert used == set(CHECKS), f"not checked: {sorted(used - set(CHECKS))}; not used: {sorted(set(CHECKS) - used)}"


def test_every_function_of_compat_says_what_it_is_for():
    missing = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files("was_fx/compat", "kernels/parts")
        if at_home(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node)
    ]
    assert not missing, missing


def test_compat_is_light_to_import():
    """What is private may be slow to import, or gone: it is imported when used."""
    heavy = [
        f"{path.name}: {ast.unparse(node)}"
        for path in files("was_fx/compat")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and re.search(r"torch\._|transformers", ast.unparse(node))
        and path.name != "quantizers.py"
    ]
    assert not heavy, heavy

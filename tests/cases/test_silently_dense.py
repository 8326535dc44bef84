"""A sparsified model is sparse on every way that leads through it, not only through `generate()`.

Wherever it can't be, it says so.
"""

import copy
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import was_fx

EAGER_WAS = {"lowering": "eager"}
DISABLED = """
import sys
import torch
from transformers import AutoModelForCausalLM
import was_fx

folder = sys.argv[1]
tensors = torch.load(f"{folder}/tensors.pt")
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
was_fx.sparsify(model, f"{folder}/schedule.was.safetensors", prefill="all", lowering="eager")
with torch.no_grad():
    torch.testing.assert_close(model(tensors["prompt"]).logits, tensors["expected"], atol=2e-4, rtol=1e-4)
    was = {"backend": "was", "options": {"lowering": "eager"}}
    for options in (was, {"backend": "inductor"}, {"backend": "eager"}):
        found = torch.compile(lambda ids: model(ids).logits, **options)(tensors["prompt"])
        torch.testing.assert_close(found, tensors["expected"], atol=2e-4, rtol=1e-4)
    text = model.generate(tensors["prompt"], max_new_tokens=8, do_sample=False, eos_token_id=127)
    assert text[:, : tensors["text"].shape[1]].equal(tensors["text"])
print("sparse")
"""


class Around(nn.Module):
    """A module of the user's own around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).logits


class Logits(nn.Module):
    """The last module of a Sequential."""

    def forward(self, output):
        return output.logits


class WithoutCache(Around):
    """What an exported program is made of."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids, use_cache=False).logits


class Thrice(nn.Module):
    """A loop of the user's own over calls of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return sum(self.inner(ids).logits for _ in range(3)) / 3


def in_place(model, **how):
    model.compile(**how)
    return model


def block_by_block(model, **how):
    for block in model.model.layers:
        block.compile(**how)
    return model


def linear_by_linear(model, **how):
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.compile(**how)
    return model


def body_alone(model, **how):
    body = torch.compile(model.model, **how)
    return lambda ids: model.lm_head(body(ids)[0])


def body_in_place(model, **how):
    model.model = torch.compile(model.model, **how)
    return model


def functional(model, **how):
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return torch.compile(lambda ids: torch.func.functional_call(model, named, (ids,)).logits, **how)


COMPILED = {
    "closure": lambda model, **how: torch.compile(lambda ids: model(ids).logits, **how),
    "module around it": lambda model, **how: torch.compile(Around(model), **how),
    "Sequential": lambda model, **how: torch.compile(nn.Sequential(model, Logits()), **how),
    "loop": lambda model, **how: torch.compile(Thrice(model), **how),
    "itself": torch.compile,
    "its forward": lambda model, **how: torch.compile(model.forward, **how),
    "its call": lambda model, **how: torch.compile(model.__call__, **how),
    "in place": in_place,
    "block by block": block_by_block,
    "Linear by Linear": linear_by_linear,
    "its body alone": body_alone,
    "its body in place": body_in_place,
    "functional_call": functional,
}
UNCOMPILED = {
    "itself": lambda model: model,
    "its forward": lambda model: model.forward,
    "closure": lambda model: lambda ids: model(ids).logits,
    "module around it": Around,
    "Sequential": lambda model: nn.Sequential(model, Logits()),
    "DataParallel": nn.DataParallel,
    "its body alone": lambda model: lambda ids: model.lm_head(model.model(ids)[0]),
    "its body's forward": lambda model: lambda ids: model.lm_head(model.model.forward(ids)[0]),
    "functional_call": lambda model: lambda ids: torch.func.functional_call(model, dict(model.named_parameters()), ids),
    "weights given as tensors": lambda model: (
        lambda ids: torch.func.functional_call(model, {name: p.detach() for name, p in model.named_parameters()}, ids)
    ),
    "dynamo disabled": torch.compiler.disable,
}


def assert_sparse_in_prompts(case, found):
    expected, dense = (case.logits(model, case.prompt) for model in (case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)


@pytest.mark.parametrize("way", UNCOMPILED)
def test_a_call_that_is_not_compiled(case, way):
    model = case.sparse(prefill="all")
    assert_sparse_in_prompts(case, case.logits(UNCOMPILED[way](model), case.prompt))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own attention
def test_a_call_under_vmap(case):
    model = case.sparse(prefill="all")
    call = torch.func.vmap(lambda row: model(row, use_cache=False).logits)
    assert_sparse_in_prompts(case, case.logits(call, case.prompt[None])[0])


@pytest.mark.parametrize("way", COMPILED)
def test_a_call_that_another_compiler_gets(block, way):
    fast = COMPILED[way](block.sparse(prefill="all"), backend="eager")
    assert_sparse_in_prompts(block, block.logits(fast, block.prompt))


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("closure", {"backend": "aot_eager"}),
        ("closure", {"backend": "was", "options": EAGER_WAS}),
        ("module around it", {"backend": "was", "options": EAGER_WAS}),
        ("its body alone", {"backend": "was", "options": EAGER_WAS}),
        ("block by block", {"backend": "was", "options": EAGER_WAS}),
        pytest.param("closure", {"backend": "inductor"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_call_that_other_backends_get(block, way, how):
    fast = COMPILED[way](block.sparse(prefill="all"), **how)
    assert_sparse_in_prompts(block, block.logits(fast, block.prompt))


@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_a_closure_over_a_model_of_another_kind(request, kind):
    case = request.getfixturevalue(kind)
    fast = torch.compile(lambda ids: model(ids).logits, backend="eager")
    model = case.sparse(prefill="all")
    assert_sparse_in_prompts(case, case.logits(fast, case.prompt))


@pytest.mark.parametrize(
    ("backend", "kind"),
    [(None, "dynamic"), (None, "static"), ("eager", "dynamic"), ("was", "dynamic"), ("was", "static")],
    ids=str,
)
def test_prompts_stay_dense_and_decode_steps_are_sparse(block, backend, kind):
    model = block.sparse()
    call = lambda ids, **keywords: model(ids, **keywords).logits  # noqa: E731
    if backend is not None:
        call = torch.compile(call, backend=backend, options=EAGER_WAS if backend == "was" else None)
    ids = block.prompt
    found = block.steps(call, ids, kind=kind)
    expected = block.steps(block.oracle("dense"), ids, kind=kind)
    dense = block.steps(block.dense(), ids, kind=kind)
    block.assert_close(found[:, :8], dense[:, :8])
    block.assert_sparse(found[:, 8:], expected[:, 8:], dense[:, 8:])


def test_decode_steps_of_every_kind_of_model(each):
    found = each.steps(each.sparse(), each.prompt)
    expected = each.steps(each.oracle("dense"), each.prompt)
    each.assert_close(found, expected)
    each.assert_apart(found[:, 8:], each.steps(each.dense(), each.prompt)[:, 8:])


@pytest.mark.parametrize(("what", "when"), [("forward", "before"), ("forward", "after"), ("compile", "after")])
def test_a_model_compiled_by_its_user_before_or_after(block, when, what):
    """A compiled call set on the model itself: a common recipe for a static cache."""
    model = block.dense()
    if when == "after":
        was_fx.sparsify(model, block.schedule)
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    if when == "before":
        block.logits(model, block.prompt)
        was_fx.sparsify(model, block.schedule)
    expected = block.greedy(block.oracle("dense"), block.prompt, max_new_tokens=4)
    assert not expected.equal(block.greedy(block.dense(), block.prompt, max_new_tokens=4))
    kinds = ("static",) if when == "before" else ("static", "dynamic")
    for kind in kinds:
        found = block.greedy(model, block.prompt, max_new_tokens=4, cache_implementation=kind)
        assert found.equal(expected)


def test_evaluate_measures_what_a_compiled_forward_does(block):
    model = block.sparse()
    model.forward = torch.compile(model.forward, backend="eager")
    found = was_fx.evaluate(model, block.tokens[:2, :32], prefill="all")
    logits = block.logits(block.oracle(), block.tokens[:2, :32])[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), block.tokens[:2, 1:32].flatten())
    assert found.loss == pytest.approx(loss.item(), abs=1e-4)
    assert found.realised == pytest.approx(0.7, abs=0.1)
    dense = was_fx.evaluate(block.dense(), block.tokens[:2, :32])
    assert abs(dense.loss - found.loss) > 0.001


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
@pytest.mark.parametrize("how", [{"lowering": "eager"}, {}], ids=["compiled", "plain"])
def test_a_stance_of_the_compiler(block, stance, how):
    model = block.sparse(prefill="all", **how)
    fast = torch.compile(lambda ids: model(ids).logits, backend="was", options=EAGER_WAS)
    with torch.compiler.set_stance(stance):
        assert_sparse_in_prompts(block, block.logits(model, block.prompt))
        assert_sparse_in_prompts(block, block.logits(fast, block.prompt))


@pytest.mark.parametrize("backend", ["eager", "was"])
def test_more_shapes_than_the_compiler_keeps(block, backend):
    """Past its limit of graphs Dynamo runs a function as it is."""
    model = block.sparse(prefill="all")
    options = EAGER_WAS if backend == "was" else None
    fast = torch.compile(lambda ids: model(ids).logits, backend=backend, options=options, dynamic=False)
    expected, dense = block.oracle(), block.dense()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=False):
        for length in (5, 7, 9):
            ids = block.tokens[:1, :length]
            block.assert_sparse(block.logits(fast, ids), block.logits(expected, ids), block.logits(dense, ids))


def test_compilation_switched_off_by_the_environment(case, tmp_path):
    dense, oracle = case.dense(), case.oracle()
    dense.save_pretrained(tmp_path / "model")
    case.schedule.save(tmp_path / "schedule.was.safetensors")
    expected = case.logits(oracle, case.prompt)
    case.assert_apart(expected, case.logits(dense, case.prompt))
    text = oracle.generate(case.prompt, max_new_tokens=8, do_sample=False, eos_token_id=127)
    torch.save({"prompt": case.prompt, "expected": expected, "text": text}, tmp_path / "tensors.pt")
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-c", DISABLED, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("sparse")


# Adapters around the model.


def with_adapters(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("first", ["sparsify", "adapters"])
@pytest.mark.parametrize("how", [None, {"backend": "eager"}, {"backend": "was", "options": EAGER_WAS}], ids=str)
def test_a_model_with_adapters_around_it(block, drop, first, how):
    if first == "sparsify":
        model = with_adapters(block.sparse(prefill="all"))
    else:
        model = with_adapters(block.dense())
        was_fx.sparsify(model.get_base_model(), block.schedule, prefill="all")
    call = model if how is None else torch.compile(lambda ids: model(input_ids=ids).logits, **how)
    dense = with_adapters(block.dense())
    expected = drop(with_adapters(block.dense()), block.schedule)
    found = block.logits(call, block.prompt)
    block.assert_sparse(found, block.logits(expected, block.prompt), block.logits(dense, block.prompt))


# Exported programs.


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["case", "gpt2"])
def test_an_exported_program_is_sparse(request, kind, strict):
    case = request.getfixturevalue(kind)
    model = WithoutCache(case.sparse(prefill="all"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it traces
        program = torch.export.export(model, (case.prompt,), strict=strict)
    sparse = [node for node in program.graph.nodes if "sparse_linear" in str(node.target)]
    assert len(sparse) == len(case.schedule.linears)
    assert_sparse_in_prompts(case, case.logits(program.module(), case.prompt))


def test_an_exported_dense_program_of_the_same_model_has_no_such_op(case):
    model = WithoutCache(was_fx.densify(case.sparse(prefill="all")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (case.prompt,))
    assert not [node for node in program.graph.nodes if "sparse_linear" in str(node.target)]


# Weights that come from elsewhere.


def other_weights(case):
    """A dense model of the same shapes and other weights, and its state dict."""
    torch.manual_seed(5)
    model = case.dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    return model, copy.deepcopy(model.state_dict())


def replace_parameters(model, state):
    for name, value in state.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value.clone()))


def assign(model, state):
    model.load_state_dict(state, assign=True)


def assign_other_strides(model, state):
    """As a loader that keeps whatever layout a file has."""
    columns = {name: value.t().contiguous().t() for name, value in state.items() if value.dim() == 2}
    model.load_state_dict({**state, **columns}, assign=True)


def through_accelerate(model, state):
    accelerate = pytest.importorskip("accelerate.utils")
    for name, value in state.items():
        accelerate.set_module_tensor_to_device(model, name, "cpu", value=value)


def in_place_values(model, state):
    model.load_state_dict(state)


def data_replaced(model, state):
    for name, parameter in model.named_parameters():
        parameter.data = state[name].clone()


def data_changed(model, state):
    for name, parameter in model.named_parameters():
        parameter.data += state[name] - parameter.data


def copied_without_grad(model, state):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def swapped(model, state):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = [
    replace_parameters,
    assign,
    assign_other_strides,
    through_accelerate,
    in_place_values,
    data_replaced,
    data_changed,
    copied_without_grad,
    swapped,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["case", "teal", "gpt2"])
def test_new_weights_are_used_with_thresholds_of_their_own(request, kind, change):
    case = request.getfixturevalue(kind)
    other, state = other_weights(case)
    state = {name: value for name, value in state.items() if name in dict(case.dense().named_parameters())}
    if change in (assign, assign_other_strides, in_place_values, swapped):
        state = other.state_dict()
    model = case.sparse(prefill="all")
    case.logits(model, case.prompt)
    change(model, state)
    model.tie_weights()  # a replaced embedding is no longer the head's
    found = case.logits(model, case.prompt)
    case.assert_sparse(found, case.logits(case.oracle(model=other), case.prompt), case.logits(other, case.prompt))
    case.assert_apart(found, case.logits(case.oracle(), case.prompt))


def test_one_replaced_weight_stays_sparse(case):
    model, dense = case.sparse(prefill="all"), case.dense()
    for each in (model, dense):
        module = each.model.layers[0].mlp.gate_proj
        module.weight = nn.Parameter(module.weight.detach() * 1.5)
    assert was_fx.evaluate(model, case.tokens, prefill="all").linears["model.layers.0.mlp.gate_proj"] > 0.3
    expected = case.logits(case.oracle(model=dense), case.prompt)
    case.assert_sparse(case.logits(model, case.prompt), expected, case.logits(dense, case.prompt))


@pytest.mark.parametrize("change", [assign, in_place_values, data_changed])
def test_densify_after_new_weights_keeps_them(case, change):
    other, state = other_weights(case)
    model = case.sparse(prefill="all")
    change(model, state)
    case.assert_apart(case.logits(model, case.prompt), case.logits(other, case.prompt))
    was_fx.densify(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in other.modules()}
    assert case.logits(model, case.prompt).equal(case.logits(other, case.prompt))


def test_a_model_built_on_the_meta_device(case):
    with torch.device("meta"):
        model = LlamaForCausalLM(case.dense().config).eval()
    model.load_state_dict(case.dense().state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(case.dense().model.rotary_emb)  # its buffers are not in the state
    was_fx.sparsify(model, case.schedule, prefill="all")
    assert_sparse_in_prompts(case, case.logits(model, case.prompt))


def test_new_weights_are_noticed_by_a_compiled_call(block):
    model = block.sparse(prefill="all", lowering="eager")
    fast = torch.compile(lambda ids: model(ids).logits, backend="was", options=EAGER_WAS)
    for call in (model, fast):
        block.logits(call, block.prompt)
    other, state = other_weights(block)
    expected, dense = (block.logits(each, block.prompt) for each in (block.oracle(model=other), other))
    model.load_state_dict(state)
    for call in (model, fast):
        block.assert_sparse(block.logits(call, block.prompt), expected, dense)


def test_new_weights_of_a_part_are_noticed_by_a_compiled_call(block):
    model, (other, _) = block.sparse(prefill="all"), other_weights(block)
    fast = torch.compile(lambda ids: model(ids).logits, backend="eager")
    block.logits(fast, block.prompt)
    dense = block.dense()
    for each in (model, dense):
        each.model.layers[0].load_state_dict(other.model.layers[0].state_dict())
    expected = block.logits(block.oracle(model=dense), block.prompt)
    block.assert_sparse(block.logits(fast, block.prompt), expected, block.logits(dense, block.prompt))


def test_new_weights_are_noticed_by_the_next_generate(case):
    model = case.sparse()
    before = case.greedy(model, case.prompt)
    other, state = other_weights(case)
    model.load_state_dict(state)
    found = case.greedy(model, case.prompt)
    assert found.equal(case.greedy(case.oracle("dense", model=other), case.prompt))
    assert not found.equal(case.greedy(other, case.prompt))
    assert not found.equal(before)


def test_what_is_nominal_stays_realised_after_new_weights(case):
    model = case.sparse()
    with torch.no_grad():
        for name in case.schedule.linears:
            model.get_submodule(name).weight.mul_(3.0)
        for norm in (module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"):
            norm.weight.mul_(1 / 3)  # so that scores are about what they were
    dense = case.dense()
    dense.load_state_dict(model.state_dict())
    found = was_fx.evaluate(model, case.tokens, prefill="all")
    expected = {name: 0.0 for name in case.schedule.linears}
    oracle = case.oracle(model=dense)
    for name in expected:
        oracle.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: expected.update({name: (inputs[0] == 0).float().mean().item()})
        )
    case.logits(oracle, case.tokens)
    assert found.linears == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("change", [in_place_values, assign])
def test_a_saved_schedule_keeps_its_own_fingerprint(case, change, tmp_path):
    model = case.sparse()
    change(model, other_weights(case)[1])
    case.logits(model, case.prompt)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.was.safetensors")
    saved = was_fx.Schedule.load(file)
    assert saved.metadata.fingerprint == case.schedule.metadata.fingerprint
    assert saved == case.schedule


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_adapters_merged_in_place(case, merge):
    dense = with_adapters(case.dense())
    dense = dense.merge_and_unload()
    model = with_adapters(case.sparse(prefill="all"))
    case.logits(model, case.prompt)
    getattr(model, "merge_adapter" if merge == "merge_adapter" else "eval")()
    merged = model if merge == "merge_adapter" else model.merge_and_unload()
    found = case.logits(merged, case.prompt)
    expected = case.logits(case.oracle(model=dense), case.prompt)
    case.assert_sparse(found, expected, case.logits(dense, case.prompt))
    case.assert_apart(found, case.logits(case.oracle(), case.prompt))


def test_a_pruned_weight_stays_sparse(case):
    """torch's pruning holds the weight as a plain attribute, made anew before each call."""
    from torch.nn.utils import prune

    model, dense = case.sparse(prefill="all"), case.dense()
    shape = dense.model.layers[0].mlp.gate_proj.weight.shape
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    for each in (model, dense):
        prune.custom_from_mask(each.model.layers[0].mlp.gate_proj, "weight", mask)
        prune.remove(each.model.layers[0].mlp.gate_proj, "weight")
        prune.custom_from_mask(each.model.layers[1].mlp.gate_proj, "weight", mask)
    found = case.logits(model, case.prompt)
    prune.remove(dense.model.layers[1].mlp.gate_proj, "weight")
    expected = case.logits(case.oracle(model=dense), case.prompt)
    case.assert_sparse(found, expected, case.logits(dense, case.prompt))


def test_a_parametrized_weight_stays_sparse(case):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    from torch.nn.utils import parametrize

    model, dense = case.sparse(prefill="all"), case.dense()
    parametrize.register_parametrization(model.model.layers[0].mlp.gate_proj, "weight", Doubled())
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight.mul_(2)
    found = case.logits(model, case.prompt)
    expected = case.logits(case.oracle(model=dense), case.prompt)
    case.assert_sparse(found, expected, case.logits(dense, case.prompt))


def test_densify_leaves_a_parametrization_in_place(case):
    model, dense = case.sparse(prefill="all"), case.dense()
    for each in (model, dense):
        nn.utils.parametrizations.weight_norm(each.model.layers[0].mlp.gate_proj)
    case.logits(model, case.prompt)
    was_fx.densify(model)
    case.assert_close(case.logits(model, case.prompt), case.logits(dense, case.prompt))
    for each in (model, dense):
        nn.utils.parametrize.remove_parametrizations(each.model.layers[0].mlp.gate_proj, "weight")
    assert {type(module) for module in model.modules()} == {type(module) for module in dense.modules()}


# Modules that a user puts in the place of others.

GATE = "model.layers.0.mlp.gate_proj"


def another_linear(model, outputs=160):
    torch.manual_seed(5)
    model.set_submodule(GATE, nn.Linear(64, outputs, bias=False))


def another_block(model):
    torch.manual_seed(5)
    block = type(model.model.layers[0])(model.config, 0)
    model.model.layers[0] = block.eval()


@pytest.mark.parametrize("change", [another_linear, another_block])
@pytest.mark.parametrize("way", ["itself", "its body alone"])
def test_a_module_put_in_the_place_of_another_is_sparse_too(case, change, way):
    model, other = case.sparse(prefill="all"), case.dense()
    for each in (model, other):
        change(each)
    found = case.logits(UNCOMPILED[way](model), case.prompt)
    case.assert_sparse(found, case.logits(case.oracle(model=other), case.prompt), case.logits(other, case.prompt))
    was_fx.densify(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in other.modules()}
    assert case.logits(model, case.prompt).equal(case.logits(other, case.prompt))


def test_a_scheduled_head_that_is_resized_stays_sparse(tied):
    model, other = tied.sparse(prefill="all"), tied.dense()
    for each in (model, other):
        torch.manual_seed(0)
        each.resize_token_embeddings(140, mean_resizing=False)
    found = tied.logits(model, tied.prompt)
    tied.assert_sparse(found, tied.logits(tied.oracle(model=other), tied.prompt), tied.logits(other, tied.prompt))
    assert was_fx.evaluate(model, tied.tokens).linears["lm_head"] > 0.3


def test_a_module_put_in_the_place_of_another_is_measured(case):
    for measure in (lambda model: was_fx.evaluate(model, case.tokens).linears, was_fx.check):
        model = case.sparse()
        another_linear(model)
        found = measure(model)
        rows = found if isinstance(found, dict) else {row.name: row.realised for row in found.linears}
        assert rows.keys() == case.schedule.linears.keys()
        assert rows[GATE] > 0.3
    model = case.sparse()
    another_linear(model)
    was_fx.sparsify(model, was_fx.uniform(case.calibration, 0.4), allow_other_model=True)
    assert was_fx.evaluate(model, case.tokens).linears[GATE] > 0.1


@pytest.mark.parametrize("what", ["a Linear of other channels", "no Linear"])
def test_a_module_that_the_schedule_does_not_fit_is_named_once(case, what):
    model = case.sparse()
    if what == "no Linear":
        model.set_submodule(GATE, nn.Sequential(nn.Linear(64, 160)))
    else:
        another_linear(model, 96)
        for name, shape in (("up_proj", (64, 96)), ("down_proj", (96, 64))):
            model.set_submodule(f"model.layers.0.mlp.{name}", nn.Linear(*shape, bias=False))
    with pytest.warns(UserWarning, match="was replaced") as told:
        case.greedy(model, case.prompt)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = was_fx.check(model, case.prompt)
    assert [row.name for row in report.linears if row.dense] == [
        name for name in case.schedule.linears if any(name in str(each.message) for each in told)
    ]
    was_fx.densify(model)


def test_a_model_that_lost_a_block(case):
    model, oracle = case.sparse(), case.oracle("dense")
    for each in (model, oracle):
        del each.model.layers[1]
        each.config.num_hidden_layers = 1
    assert case.greedy(model, case.prompt).equal(case.greedy(oracle, case.prompt))
    report = was_fx.check(model)
    assert report.ok
    assert len(report.linears) == 7
    assert any("7 scheduled Linears are not in the model" in note for note in report.notes)
    was_fx.densify(model)


def test_blocks_that_are_wrapped_keep_their_names(block):
    model = block.sparse()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert block.greedy(model, block.prompt).equal(block.greedy(block.oracle("dense"), block.prompt))
    report = was_fx.check(model)
    assert report.ok
    assert {row.name for row in report.linears} == set(block.schedule.linears)
    was_fx.densify(model)
    assert was_fx.calibrate(model, block.tokens).shapes == block.calibration.shapes


def test_a_body_that_two_models_share_is_made_sparse_once(case):
    model = case.sparse()
    other = type(model)(model.config).eval()
    other.model = model.model
    with pytest.raises(ValueError, match="is sparse already"):
        was_fx.sparsify(other, case.schedule, allow_other_model=True)
    was_fx.densify(model)
    case.assert_close(case.logits(model, case.prompt), case.logits(case.dense(), case.prompt))


# What a prompt is.


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_a_prompt_of_one_token_is_a_prompt(case, kind):
    ids = case.prompt[:, :1]
    keywords = {} if kind is None else {"use_cache": True, **case.cached(case.cache(kind))}
    found = case.logits(case.sparse(), ids, **keywords)
    dense = case.logits(case.dense(), ids)
    case.assert_close(found, dense)
    case.assert_apart(case.logits(case.oracle(), ids), dense)


@pytest.mark.parametrize(("kind", "how"), [("dynamic", {}), ("static", {}), ("static", {"lowering": "eager"})], ids=str)
def test_generate_from_one_token(block, kind, how):
    ids, model = block.prompt[:, :1], block.sparse(**how)
    arguments = {"cache_implementation": kind, "output_logits": True, "return_dict_in_generate": True}
    found, expected, dense = (
        torch.stack(block.greedy(each, ids, **arguments).logits)
        for each in (model, block.oracle("dense"), block.dense())
    )
    block.assert_close(found[0], dense[0])
    block.assert_sparse(found, expected, dense)


@pytest.mark.parametrize(("kind", "backend"), [("dynamic", None), ("static", None), ("static", "was")], ids=str)
def test_several_new_tokens_after_others_are_a_prompt(block, kind, backend):
    model, dense = block.sparse(), block.dense()
    call = lambda ids, **keywords: model(ids, **keywords).logits  # noqa: E731
    call = call if backend is None else torch.compile(call, backend=backend, options=EAGER_WAS)
    caches = [block.cache(kind) for _ in range(2)]
    for part in block.prompt.split([6, 4, 2], dim=1):
        found, expected = (
            block.logits(each, part, use_cache=True, **block.cached(cache))
            for each, cache in zip((call, dense), caches, strict=True)
        )
        block.assert_close(found, expected)
    found, expected = (
        block.logits(each, block.prompt[:, :1], use_cache=True, **block.cached(cache))
        for each, cache in zip((call, dense), caches, strict=True)
    )
    block.assert_apart(found, expected)


def test_generate_without_a_cache_says_once_that_nothing_is_sparse(case):
    model = case.sparse()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = case.greedy(model, case.prompt, use_cache=False)
        case.greedy(model, case.prompt, use_cache=False)
    said = [str(each.message) for each in caught if "cache" in str(each.message)]
    assert len(said) == 1, said
    assert "dense" in said[0] or "sparse" in said[0]
    assert found.equal(case.greedy(case.dense(), case.prompt))


@pytest.mark.filterwarnings("ignore:.*cache.*:UserWarning")
def test_generate_without_a_cache_is_sparse_where_prompts_are(case):
    found = case.greedy(case.sparse(prefill="all"), case.prompt, use_cache=False)
    assert found.equal(case.greedy(case.oracle(), case.prompt, use_cache=False))
    assert not found.equal(case.greedy(case.dense(), case.prompt))


def test_a_caller_that_uses_a_cache_is_told_nothing(case):
    model = case.sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.greedy(model, case.prompt)
        case.logits(model, case.prompt)


# Passes that must run.


@pytest.mark.parametrize("name", ["sparsify_linears", "insert", "merge", "recognize_linears", "choose_phase"])
def test_a_pass_that_is_not_optional_can_not_be_left_out(case, name):
    optional = ("merge_siblings", "list_channels", "fuse_attention", "fuse_rms_norms")
    model = case.dense()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=name) as caught:
        was_fx.sparsify(model, case.schedule, disable=(name,))
    assert all(choice in str(caught.value) for choice in optional)
    assert [type(module) for module in model.modules()] == classes
    assert case.logits(model, case.prompt).equal(case.logits(case.dense(), case.prompt))
    fast = torch.compile(case.sparse(), backend="was", options={**EAGER_WAS, "disable": (name,)})
    with pytest.raises(Exception, match=name) as caught:
        case.logits(fast, case.prompt)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), ValueError)
    assert all(choice in str(caught.value) for choice in optional)


# What is told about it.


def test_check_reports_every_linear_of_a_sparse_model(each):
    report = was_fx.check(each.sparse(), each.prompt)
    assert report.ok
    assert report.path == "eager"
    assert [row.name for row in report.linears] == list(each.schedule.linears)
    for row in report.linears:
        assert row.nominal == pytest.approx(each.schedule.linears[row.name].sparsity)
        assert 0.2 < row.realised < 1
        assert row.tokens > 0
        assert row.implementation
        assert not row.dense


def test_check_counts_decode_steps_as_the_oracle_does(case):
    report = was_fx.check(case.sparse(), case.prompt, new_tokens=6)
    model = case.oracle("dense")
    counted = {name: [0, 0] for name in case.schedule.linears}

    def count(_, inputs, name):
        if inputs[0].shape[1] == 1:
            counted[name][0] += int((inputs[0] == 0).sum())
            counted[name][1] += inputs[0].shape[-1]

    for name in counted:
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: count(_, inputs, name))
    case.greedy(model, case.prompt, max_new_tokens=6)
    for row in report.linears:
        dropped, seen = counted[row.name]
        assert row.realised == pytest.approx(dropped / seen, abs=0.02)


def replaced_by_another_module(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(64, 160))
    with pytest.warns(UserWarning, match="up_proj was replaced by Sequential"):
        model(torch.tensor([[5, 6]]), use_cache=True)


def with_the_forward_of_a_dense_one(model):
    module = model.model.layers[0].mlp.up_proj
    module.forward = types.MethodType(nn.Linear.forward, module)


@pytest.mark.parametrize("make_dense", [replaced_by_another_module, with_the_forward_of_a_dense_one])
def test_check_reports_a_linear_that_runs_dense(case, make_dense):
    model = case.sparse()
    make_dense(model)
    report = was_fx.check(model, case.prompt)
    assert not report.ok
    assert [row.name for row in report.linears if row.dense] == ["model.layers.0.mlp.up_proj"]
    (row,) = [row for row in report.linears if row.dense]
    assert row.reason


@pytest.mark.filterwarnings("ignore:.*cache.*:UserWarning")
def test_check_reports_a_model_that_decodes_without_a_cache(case):
    model = case.sparse()
    model.generation_config.use_cache = False
    report = was_fx.check(model, case.prompt)
    assert not report.ok
    assert all(row.dense for row in report.linears)
    assert any("cache" in note for note in report.notes)


def test_check_leaves_the_model_as_it_was(case):
    model = case.sparse()
    before = case.steps(model, case.prompt)
    state = torch.get_rng_state()
    was_fx.check(model)
    assert torch.get_rng_state().equal(state)
    assert case.steps(model, case.prompt).equal(before)


def test_check_names_the_compiled_path(case):
    model = case.sparse()
    assert was_fx.check(model, case.prompt).path == "eager"
    model.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    report = was_fx.check(model, case.prompt)
    assert report.ok
    assert report.path == "compiled"


def test_check_of_a_dense_model_is_refused(case):
    with pytest.raises(ValueError, match="sparsif"):
        was_fx.check(case.dense(), case.prompt)


def test_the_command_line_says_whether_a_model_decodes_sparsely(case, tmp_path):
    from typer.testing import CliRunner

    from was_fx.cli.main import app

    model = case.dense()
    model.save_pretrained(tmp_path / "model")
    model.generation_config.use_cache = False
    model.save_pretrained(tmp_path / "without cache")
    case.schedule.save(tmp_path / "schedule.was.safetensors")
    runner = CliRunner(env={"COLUMNS": "80"})
    options = ["--schedule", str(tmp_path / "schedule.was.safetensors")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cache.*", UserWarning)
        good = runner.invoke(app, ["check", str(tmp_path / "model"), *options, "--json"])
        bad = runner.invoke(app, ["check", str(tmp_path / "without cache"), *options, "--json"])
        shown = runner.invoke(app, ["check", str(tmp_path / "model"), *options])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["ok"] is True
    assert {row["name"] for row in json.loads(good.stdout)["linears"]} == set(case.schedule.linears)
    assert bad.exit_code == 1, bad.output
    assert json.loads(bad.stdout)["ok"] is False
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80

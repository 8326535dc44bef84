"""`torch.compile(..., backend="was")` on sparsified models, on parts of them, and on dense ones with a schedule."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.exc import OperatorIssue
from torch._inductor.lowering import lowerings
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import was_fx
from was_fx.compile import backend
from was_fx.compile.backend import register, was
from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.modules import token_rule
from was_fx.passes import pipeline

EAGER = {"lowering": "eager"}
TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **TOKENS,
)
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS)


@pytest.fixture(autouse=True)
def fresh():
    register()
    torch.compiler.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


class Subject:
    """A dense model with its calibration."""

    def __init__(self, kind, config):
        torch.manual_seed(0)
        self._model = kind(config).eval()
        self.tokens = torch.randint(0, 128, (2, 16))
        self.calibration = was_fx.calibrate(self._model, self.tokens)

    def dense(self) -> nn.Module:
        return copy.deepcopy(self._model)

    def schedule(self, target: float = 0.5) -> was_fx.Schedule:
        return was_fx.uniform(self.calibration, target)

    def sparse(self, target: float = 0.5, prefill: str = "all") -> nn.Module:
        return was_fx.sparsify(self.dense(), self.schedule(target), prefill=prefill)

    def oracle(self, target: float = 0.5) -> nn.Module:
        """A dense copy with the weak channels of its inputs set to zero by hooks."""
        model = self.dense()
        for name, entry in self.schedule(target).linears.items():
            module = model.get_submodule(name)
            norms = module.weight.abs().sum(1 if type(module).__name__ == "Conv1D" else 0)
            module.register_forward_pre_hook(partial(zero_weak_channels, limits=entry.threshold / norms))
        return model


def zero_weak_channels(module, args, limits):
    return torch.where(args[0].abs() > limits, args[0], torch.zeros_like(args[0])), *args[1:]


@pytest.fixture(scope="module")
def llama():
    return Subject(LlamaForCausalLM, LLAMA)


@pytest.fixture(scope="module")
def gpt2():
    return Subject(GPT2LMHeadModel, GPT2)


@pytest.fixture(params=["llama", "gpt2"])
def subject(request):
    return request.getfixturevalue(request.param)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def contexts(monkeypatch):
    """What the passes did to each graph, except those of hooks that are traced by themselves and compute nothing."""
    seen = []

    def observe(context):
        if context.module.graph.output_node().args[0]:
            seen.append(context)

    monkeypatch.setattr(pipeline, "observers", [observe])
    return seen


def close(y, expected):
    torch.testing.assert_close(getattr(y, "logits", y), getattr(expected, "logits", expected))


# Ways to compile a whole model.
WAYS = {
    "torch.compile": lambda model, **options: torch.compile(model, **options),
    "its call": lambda model, **options: torch.compile(model.__call__, fullgraph=True, **options),
    "in place": lambda model, **options: (model.compile(**options), model)[1],
    "in a function": lambda model, **options: torch.compile(lambda *each: model(*each), fullgraph=True, **options),
}


@pytest.mark.parametrize("way", WAYS)
def test_sparsified_model(subject, contexts, way):
    fast = WAYS[way](subject.sparse(), backend="was", options=EAGER)
    for _ in range(2):
        close(fast(subject.tokens), subject.oracle()(subject.tokens))
    (context,) = contexts
    assert context.counts["sparse"] == len(subject.schedule().linears)
    assert {call.name for call in context.calls} == set(subject.schedule().linears)


@pytest.mark.parametrize("way", WAYS)
def test_first_call_in_a_thread_may_be_compiled(llama, monkeypatch, way):
    """What a thread knows of its call is not set yet."""
    monkeypatch.setattr(token_rule, "_call", token_rule._Call())
    fast = WAYS[way](llama.sparse(), backend="was", options=EAGER)
    close(fast(llama.tokens), llama.oracle()(llama.tokens))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefill", ["sparse", "half"])
def test_prompts_of_a_sparsified_model_are_by_its_own_rule(llama, way, prefill):
    model = llama.sparse(prefill=prefill)
    expected = model(llama.tokens)
    close(WAYS[way](model, backend="was", options=EAGER)(llama.tokens), expected)
    assert not torch.allclose(expected.logits, llama.oracle()(llama.tokens).logits, rtol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_prompts_are_dense_by_default_and_steps_sparse(llama, way):
    model = llama.sparse(prefill="dense")
    expected = copy.deepcopy(model)
    fast = WAYS[way](model, backend="was", options=EAGER)
    prompt, step = llama.tokens[:, :-1], llama.tokens[:, -1:]
    caches = DynamicCache(config=LLAMA), DynamicCache(config=LLAMA)
    close(fast_call(fast, prompt, caches[0]), llama.dense()(prompt))
    expected(prompt, past_key_values=caches[1])
    wanted = expected(step, past_key_values=caches[1])
    close(fast_call(fast, step, caches[0]), wanted)
    past = DynamicCache(config=LLAMA)
    llama.dense()(prompt, past_key_values=past)
    assert not torch.allclose(wanted.logits, llama.dense()(step, past_key_values=past).logits, rtol=1e-2)


def fast_call(fast, tokens, cache):
    """By position, as every way to compile takes it: (input_ids, attention_mask, position_ids, past_key_values)."""
    return fast(tokens, None, None, cache)


def test_attention_of_a_block_has_the_numbers_of_that_block(llama):
    model, expected = llama.sparse(), llama.oracle()
    x = torch.randn(1, 5, 64)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    for i in (1, 0):
        fast = torch.compile(model.model.layers[i].self_attn, backend="was", options=EAGER)
        y = fast(x, position_embeddings=angles, attention_mask=None)[0]
        close(y, expected.model.layers[i].self_attn(x, position_embeddings=angles, attention_mask=None)[0])


def test_blocks_that_share_a_graph_have_their_own_numbers(llama):
    model, expected = llama.sparse(), llama.oracle()
    x = torch.randn(1, 5, 64)
    for i in (0, 1):
        model.model.layers[i].mlp.compile(backend="was", options=EAGER)
        close(model.model.layers[i].mlp(x), expected.model.layers[i].mlp(x))
    assert graphs() == 1


def test_module_below_a_wrapper(llama):
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.wrapped = inner

        def forward(self, x):
            return 2 * self.wrapped(x)

    fast = torch.compile(Twice(llama.sparse().model.layers[1].mlp), backend="was", options=EAGER)
    x = torch.randn(1, 5, 64)
    close(fast(x), 2 * llama.oracle().model.layers[1].mlp(x))


def test_module_in_a_closure(llama):
    model = llama.sparse()
    fast = torch.compile(lambda x: model.model.layers[1].mlp(x), backend="was", options=EAGER)
    x = torch.randn(1, 5, 64)
    close(fast(x), llama.oracle().model.layers[1].mlp(x))


def test_both_parts_of_a_broken_graph_are_sparse(llama):
    model, expected = llama.sparse(), llama.oracle()

    class Broken(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            x = self.layers[0].mlp(x)
            torch._dynamo.graph_break()
            return self.layers[1].mlp(x)

    fast = torch.compile(Broken(model.model.layers), backend="was", options=EAGER)
    x = torch.randn(1, 5, 64)
    close(fast(x), Broken(expected.model.layers)(x))
    assert graphs() == 2


@pytest.mark.parametrize(
    ("subject", "as_path"), [("llama", False), ("gpt2", True)], ids=["Schedule", "path"], indirect=["subject"]
)
def test_dense_model_with_a_schedule(subject, tmp_path, as_path):
    schedule = subject.schedule()
    if as_path:
        schedule.save(tmp_path / "model.was.safetensors")
        schedule = str(tmp_path / "model.was.safetensors")
    model, expected = subject.dense(), subject.oracle()(subject.tokens)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fast = torch.compile(model, backend="was", options={**EAGER, "prefill": "all", "schedule": schedule})
    for _ in range(3):
        close(fast(subject.tokens), expected)
    settled = graphs()
    close(fast(subject.tokens), expected)
    assert graphs() == settled
    for name, entry in model.state_dict().items():
        assert torch.equal(entry, before[name])
    for name in subject.schedule().linears:  # the rows that decode gathers are contiguous
        weight = model.get_parameter(f"{name}.weight")
        assert (weight if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.t()).is_contiguous()


def test_dense_model_with_a_schedule_decodes_by_it(llama, contexts):
    model = llama.dense()
    fast = torch.compile(model, backend="was", dynamic=True, options={**EAGER, "schedule": llama.schedule()})
    expected = llama.sparse(prefill="dense")
    for _ in range(2):
        caches = DynamicCache(config=LLAMA), DynamicCache(config=LLAMA)
        close(fast(llama.tokens, past_key_values=caches[0]), llama.dense()(llama.tokens))
        expected(llama.tokens, past_key_values=caches[1])
        for step in llama.tokens.t()[:3, :, None]:
            close(fast(step, past_key_values=caches[0]), expected(step, past_key_values=caches[1]))
    scheduled = len(llama.schedule().linears)
    assert {context.counts["dense (prompt)"] for context in contexts if not context.decode} == {scheduled}
    assert {context.counts["inserted"] for context in contexts if context.decode} == {scheduled}


def test_models_of_one_shape_share_graphs_and_are_right_with_their_own_weights(llama, contexts):
    """Each of them moves its weights after its first call; nothing is known of one in the graph of the other."""
    options = {**EAGER, "prefill": "all", "schedule": llama.schedule()}
    models = [llama.dense(), llama.dense()]
    for parameter in models[1].parameters():
        parameter.mul_(1.2)
    names = list(llama.schedule().linears)
    graphs_of = []
    for model in models:
        twin = was_fx.sparsify(copy.deepcopy(model), llama.schedule(), prefill="all", allow_other_model=True)
        fast = torch.compile(model, backend="was", options=options)
        for _ in range(3):
            close(fast(llama.tokens), twin(llama.tokens))
        assert all(model.get_submodule(name).weight.t().is_contiguous() for name in names)
        graphs_of.append(len(contexts))
    assert graphs_of[0] == graphs_of[1]


def test_model_that_is_gone_is_not_held_by_its_graph(llama):
    model = llama.dense()
    fast = torch.compile(model, backend="was", options={**EAGER, "schedule": llama.schedule()})
    fast(llama.tokens[:1, :1])
    weight = weakref.ref(model.lm_head.weight)
    del model, fast
    torch.compiler.reset()
    gc.collect()
    assert weight() is None


def test_changed_weights_of_a_dense_model_have_other_thresholds(subject):
    model = subject.dense()
    fast = torch.compile(model, backend="was", options={**EAGER, "prefill": "all", "schedule": subject.schedule()})
    for _ in range(3):
        twin = was_fx.sparsify(copy.deepcopy(model), subject.schedule(), prefill="all", allow_other_model=True)
        close(fast(subject.tokens), twin(subject.tokens))
        for name in subject.schedule().linears:
            model.get_submodule(name).weight.mul_(0.8)


@pytest.mark.parametrize("kind", [nn.Linear, lambda k, n: Conv1D(n, k)], ids=["Linear", "Conv1D"])
def test_changed_weights_are_seen_by_inductor(kind):
    """It may call ops with views of weights, which have no version of their own."""
    model = nn.Sequential(kind(24, 32))
    schedule = was_fx.Schedule({"0": was_fx.LinearSchedule(0.5, 4.0, 1.0)}, {"0": (32, 24)})
    fast = torch.compile(model, backend="was", options={"schedule": schedule})
    x = torch.randn(1, 1, 24)
    for _ in range(5):
        norms = model[0].weight.abs().sum(1 if isinstance(model[0], Conv1D) else 0)
        close(fast(x), model(x.masked_fill(x.abs() <= 4.0 / norms, 0)))
        model[0].weight.mul_(1.4)


def test_arguments_of_ops_are_not_written_out(monkeypatch):
    """Inductor did so for its log where it met an op first: of the last Linear of 32 blocks that took minutes."""

    def written(*arguments):
        raise AssertionError("Inductor writes out the arguments of an op")

    for op in [op for op in lowerings if getattr(op, "namespace", "") == "was"]:
        monkeypatch.delitem(lowerings, op)
    monkeypatch.setattr(OperatorIssue, "operator_str", written)
    schedule = was_fx.Schedule({"0": was_fx.LinearSchedule(0.5, 0.4, 1.0)}, {"0": (8, 24)})
    model = was_fx.sparsify(nn.Sequential(nn.Linear(24, 8)), schedule, prefill="all")
    fast = torch.compile(model, backend="was", options={"fx_graph_cache": False})
    x = torch.randn(1, 1, 24)
    close(fast(x), model(x))


@pytest.mark.parametrize("prefill", ["all", "dense"])
def test_gradients_of_a_dense_model_with_a_schedule(llama, prefill):
    model = llama.dense().requires_grad_(True)
    twin = was_fx.sparsify(llama.dense(), llama.schedule(), prefill=prefill).requires_grad_(True)
    fast = torch.compile(model, backend="was", options={**EAGER, "prefill": prefill, "schedule": llama.schedule()})
    with torch.enable_grad():
        for each in (fast, fast, twin):
            model.zero_grad()
            each(input_ids=llama.tokens, labels=llama.tokens, use_cache=False).loss.backward()
            if each is fast:
                found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def renamed(schedule, **changes):
    names = {name: changes.get(name.replace(".", "_"), name) for name in schedule.linears}
    return was_fx.Schedule(
        {names[name]: entry for name, entry in schedule.linears.items()},
        {names[name]: shape for name, shape in schedule.shapes.items()},
    )


def reshaped(schedule, name):
    n, k = schedule.shapes[name]
    return was_fx.Schedule(schedule.linears, {**schedule.shapes, name: (n + 1, k)})


def test_schedule_that_does_not_fit_is_one_error_with_every_problem(llama):
    names = list(llama.schedule().linears)
    schedule = reshaped(renamed(llama.schedule(), **{names[0].replace(".", "_"): "model.layers.7.up"}), names[1])
    model = llama.dense()
    fast = torch.compile(model, backend="was", options={**EAGER, "prefill": "all", "schedule": schedule})
    with pytest.raises(BackendCompilerFailed) as caught:
        fast(llama.tokens)
    error = caught.value.inner_exception
    assert isinstance(error, was_fx.ScheduleError)
    assert "model.layers.7.up: no Linear of the graph has this name" in str(error)
    assert f"{names[1]}: the schedule is for shape (33, 64), the model has (32, 64)" in str(error)
    assert all(parameter.is_contiguous() for parameter in model.parameters())  # nothing has moved


def test_schedule_on_a_part_of_its_model_is_an_error_with_the_way_out(llama):
    fast = torch.compile(
        llama.dense().model.layers[0].mlp, backend="was", options={**EAGER, "schedule": llama.schedule()}
    )
    with pytest.raises(BackendCompilerFailed, match=r"was_fx\.sparsify\(model, schedule\) first"):
        fast(torch.randn(1, 5, 64))


def test_second_schedule_on_one_model_is_a_graph_of_its_own(gpt2):
    model = gpt2.dense()
    for target in (0.5, 0.3, 0.5):
        options = {**EAGER, "prefill": "all", "schedule": gpt2.schedule(target)}
        close(torch.compile(model, backend="was", options=options)(gpt2.tokens), gpt2.oracle(target)(gpt2.tokens))


@pytest.mark.parametrize("part", ["model", "block"])
def test_schedule_for_a_sparsified_model_is_an_error_with_the_way_out(llama, part):
    model = llama.sparse()
    whole = {**EAGER, "schedule": llama.schedule()}
    fast = torch.compile(model if part == "model" else model.model.layers[0].mlp, backend="was", options=whole)
    with pytest.raises(BackendCompilerFailed, match=r"the model is sparsified already") as caught:
        fast(llama.tokens if part == "model" else torch.randn(1, 5, 64))
    assert isinstance(caught.value.inner_exception, was_fx.ScheduleError)
    assert "was_fx.densify(model)" in str(caught.value.inner_exception)
    was_fx.densify(model)
    if part == "model":
        close(fast(llama.tokens), llama.dense()(llama.tokens))


def test_missing_schedule_file_is_an_error_that_names_it(tmp_path):
    fast = torch.compile(nn.Linear(4, 4), backend="was", options={"schedule": str(tmp_path / "absent")})
    with pytest.raises(BackendCompilerFailed, match="absent"):
        fast(torch.randn(1, 4))


def test_models_of_one_shape_share_a_graph_and_keep_their_own_schedules(llama):
    models = {target: llama.sparse(target) for target in (0.3, 0.7)}
    fast = {
        target: torch.compile(model.model.layers[0].mlp, backend="was", options=EAGER)
        for target, model in models.items()
    }
    x = torch.randn(1, 5, 64)
    for target in (0.3, 0.7, 0.3):
        close(fast[target](x), llama.oracle(target).model.layers[0].mlp(x))
    assert graphs() == 1


def test_new_numbers_compile_nothing(gpt2, contexts):
    model = was_fx.sparsify(gpt2.dense(), gpt2.schedule(0.5), prefill="all")
    model.compile(backend="was", options=EAGER)
    model(gpt2.tokens)
    for target in (0.2, 0.8, 0.0):
        was_fx.sparsify(model, gpt2.schedule(target), prefill="all")
        close(model(gpt2.tokens), gpt2.oracle(target)(gpt2.tokens))
    assert len(contexts) == 1


def test_numbers_of_a_compiled_model_are_those_of_its_last_schedule(llama):
    model = llama.sparse(0.5)
    fast = torch.compile(model.model.layers[0].mlp, backend="was", options=EAGER)
    x = torch.randn(1, 5, 64)
    fast(x)
    was_fx.sparsify(model, llama.schedule(0.2), prefill="all")
    close(fast(x), llama.oracle(0.2).model.layers[0].mlp(x))
    assert graphs() == 1


def test_densified_model_runs_dense(subject):
    model = subject.sparse()
    fast = torch.compile(model, backend="was", options=EAGER)
    fast(subject.tokens)
    was_fx.densify(model)
    assert torch.equal(fast(subject.tokens).logits, subject.dense()(subject.tokens).logits)


def test_model_sparsified_after_it_was_compiled_runs_sparse(subject):
    model = subject.dense()
    fast = torch.compile(model, backend="was", options=EAGER)
    assert torch.equal(fast(subject.tokens).logits, subject.dense()(subject.tokens).logits)
    was_fx.sparsify(model, subject.schedule(), prefill="all")
    close(fast(subject.tokens), subject.oracle()(subject.tokens))


@pytest.mark.parametrize("disable", ["merge_siblings", ["merge_siblings"], ("merge_siblings", "fuse_attention")])
def test_passes_may_be_left_out(llama, contexts, disable):
    fast = torch.compile(llama.sparse(), backend="was", options={**EAGER, "disable": disable})
    close(fast(llama.tokens), llama.oracle()(llama.tokens))
    targets = [node.target for node in contexts[0].module.graph.nodes]
    assert sparse_siblings not in targets
    assert targets.count(sparse_linear) == 14


def test_steps_list_their_channels_where_they_are_told_to(llama, contexts, monkeypatch):
    monkeypatch.setattr("was_fx.kernels.parts.triton_parts.interpreted", lambda: False)
    model = llama.sparse()
    x = torch.randn(1, 1, 64)
    fast = torch.compile(model.model.layers[0].mlp, backend="was", options={**EAGER, "lists": True})
    close(fast(x), llama.oracle().model.layers[0].mlp(x))
    assert (contexts[0].counts["listed"], contexts[0].counts["fused gated products"]) == (3, 1)


@pytest.mark.parametrize(
    ("options", "inductor", "graph"),
    [
        ({}, True, "sparse"),
        ({"lowering": "inductor"}, True, "sparse"),
        ({"lowering": "eager"}, False, "sparse"),
        ({}, True, "dense"),
        ({"compile_prompts": True}, True, "dense"),
        ({"compile_prompts": False}, False, "dense"),
        ({"compile_prompts": False}, True, "sparse"),
        ({"compile_prompts": True, "lowering": "eager"}, False, "dense"),
        ({"compile_prompts": False, "as_step": True}, True, "dense"),
    ],
    ids=str,
)
def test_what_inductor_compiles(llama, monkeypatch, options, inductor, graph):
    compiled = []
    monkeypatch.setattr(backend, "inductor", lambda module, *_: compiled.append(module) or module.forward)
    model = llama.sparse(prefill="all" if graph == "sparse" else "dense")
    fast = torch.compile(model.model.layers[0].mlp, backend="was", options=options)
    fast(torch.randn(1, 5, 64))
    assert bool(compiled) is inductor


def test_settings_of_inductor_are_for_this_graph(llama, monkeypatch):
    given = []
    monkeypatch.setattr(backend, "inductor", lambda module, inputs, patches: given.append(patches) or module.forward)
    options = {"max_autotune": True, "epilogue_fusion": False, "triton.cudagraphs": True}
    torch.compile(llama.sparse().model.layers[0].mlp, backend="was", options=options)(torch.randn(1, 1, 64))
    assert given[0].items() >= {"max_autotune": True, "epilogue_fusion": False, "triton.cudagraphs": False}.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefil": "all"}, r"""backend "was" has no option 'prefil'; did you mean 'prefill'\?"""),
        (
            {"no such option": 1},
            r"its own are as_step, compile_prompts, cuda_graphs, disable, lists, lowering, prefill, schedule",
        ),
        ({"executor": "eager"}, r"""backend "was" has no option 'executor'"""),
        ({"lowering": "aot"}, "lowering is 'aot'; it must be 'inductor' or 'eager'"),
        ({"prefill": "some"}, "prefill is 'some'; it must be one of dense, sparse, half, all"),
        ({"disable": ("merge",), **EAGER}, "disable names merge; the passes to choose from are merge_siblings, "),
        ({"disable": "insert", **EAGER}, "disable names insert; the passes to choose from are merge_siblings, "),
        ({"prefill": "half", "schedule": "x"}, r"prefill='half' can't be told from a graph; use 'dense' or 'all', or"),
        ({"prefill": "sparse", "schedule": "x"}, r"was_fx\.sparsify\(model, schedule, prefill=…\) before torch"),
    ],
)
def test_bad_option_is_a_value_error_that_names_the_valid_ones(options, message):
    fast = torch.compile(nn.Linear(4, 4), backend="was", options=options)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        fast(torch.randn(1, 4))
    assert type(caught.value.inner_exception) is ValueError


def test_mode_of_a_sparsified_model(gpt2):
    model = was_fx.sparsify(gpt2.dense(), gpt2.schedule(), mode="reduce-overhead", lowering="inductor", prefill="all")
    close(model(gpt2.tokens), gpt2.oracle()(gpt2.tokens))


def test_unknown_mode_is_refused(llama):
    with pytest.raises(RuntimeError, match="Unrecognized mode=fast"):
        was_fx.sparsify(llama.dense(), llama.schedule(), mode="fast")


def test_backend_may_be_given_by_name_or_as_the_function(llama):
    assert "was" in torch._dynamo.list_backends()
    register()  # a second time
    fast = torch.compile(llama.sparse().model.layers[0].mlp, backend=partial(was, options=EAGER))
    x = torch.randn(1, 5, 64)
    close(fast(x), llama.oracle().model.layers[0].mlp(x))


def test_inductor_with_a_mode_and_changing_numbers(llama):
    model = llama.sparse()
    fast = torch.compile(model.model.layers[0].mlp, backend="was", mode="reduce-overhead")
    step = torch.randn(1, 1, 64)
    close(fast(step), llama.oracle().model.layers[0].mlp(step))
    was_fx.sparsify(model, llama.schedule(0.2), prefill="all")
    close(fast(step), llama.oracle(0.2).model.layers[0].mlp(step))
    assert graphs() == 1


def test_inductor_on_a_prompt_with_dense_tokens_that_is_counted(llama):
    model = llama.sparse(prefill="half")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.was_counts = torch.zeros(2, dtype=torch.int64)
    fast = torch.compile(mlp, backend="was", dynamic=True)
    x = torch.randn(2, 6, 64)
    y = fast(x)
    close(y[:, :3], llama.dense().model.layers[0].mlp(x)[:, :3])
    close(y[:, 3:], llama.oracle().model.layers[0].mlp(x)[:, 3:])
    dropped = (x[:, 3:].abs() <= mlp.up_proj.was_threshold).sum()
    assert mlp.up_proj.was_counts.tolist() == [dropped, 2 * 3 * 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_on_a_whole_model(llama, dtype):
    model = llama.sparse().to(dtype)
    expected = model(llama.tokens).logits
    fast = torch.compile(model, backend="was")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(fast(llama.tokens).logits, expected, **tolerance)

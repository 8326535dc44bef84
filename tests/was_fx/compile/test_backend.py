"""`torch.compile(..., backend="was")` on sparsified models, on parts of them, and on dense ones with a schedule."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import was_fx
from was_fx.compile.backend import BackendOptions, has_compiler, mode_options, register, was
from was_fx.kernels.linear.layout import follows
from was_fx.passes.bindings import bindings

EAGER = {"prefill": "all", "executor": "eager"}
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

    def sparse(self, target: float = 0.5) -> nn.Module:
        """Sparsified; its own compiled call is taken off, so that only what a test compiles is compiled."""
        model = was_fx.sparsify(self.dense(), self.schedule(target), **EAGER)
        model._compiled_call_impl = None
        return model

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


def close(y, expected):
    torch.testing.assert_close(getattr(y, "logits", y), getattr(expected, "logits", expected))


def test_sparsified_model(subject):
    fast = torch.compile(subject.sparse(), backend="was", options=EAGER)
    close(fast(subject.tokens), subject.oracle()(subject.tokens))
    assert graphs() == 1


def test_prompts_are_dense_by_default_and_steps_sparse(llama):
    fast = torch.compile(llama.sparse(), backend="was", options={"executor": "eager"})
    close(fast(llama.tokens), llama.dense()(llama.tokens))
    close(fast(llama.tokens[:1, :1]), llama.oracle()(llama.tokens[:1, :1]))


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
    fast = torch.compile(model, backend="was", options={**EAGER, "schedule": schedule})
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


def test_dense_model_with_a_schedule_decodes_by_it(llama):
    fast = torch.compile(llama.dense(), backend="was", options={"executor": "eager", "schedule": llama.schedule()})
    step = llama.tokens[:1, :1]
    for _ in range(2):
        close(fast(llama.tokens), llama.dense()(llama.tokens))
        close(fast(step), llama.oracle()(step))


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
    fast = torch.compile(model, backend="was", options={**EAGER, "schedule": schedule})
    with pytest.raises(BackendCompilerFailed) as caught:
        fast(llama.tokens)
    error = caught.value.inner_exception
    assert isinstance(error, was_fx.ScheduleError)
    assert "model.layers.7.up: no Linear of the graph has this name" in str(error)
    assert f"{names[1]}: the schedule is for shape (33, 64), the model has (32, 64)" in str(error)
    assert not any(bindings(parameter) for parameter in model.parameters())


def test_schedule_on_a_part_of_its_model_is_an_error_with_the_way_out(llama):
    fast = torch.compile(
        llama.dense().model.layers[0].mlp, backend="was", options={**EAGER, "schedule": llama.schedule()}
    )
    with pytest.raises(BackendCompilerFailed, match=r"was_fx\.sparsify\(model, schedule\) first"):
        fast(torch.randn(1, 5, 64))


def test_second_schedule_on_one_model_is_an_error(gpt2):
    model = gpt2.dense()
    torch.compile(model, backend="was", options={**EAGER, "schedule": gpt2.schedule(0.5)})(gpt2.tokens)
    second = torch.compile(model, backend="was", options={**EAGER, "schedule": gpt2.schedule(0.3)})
    with pytest.raises(BackendCompilerFailed, match="the model has other thresholds already"):
        second(gpt2.tokens)
    was_fx.densify(model)
    close(second(gpt2.tokens), gpt2.oracle(0.3)(gpt2.tokens))


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


def test_new_numbers_compile_nothing(gpt2):
    model = was_fx.sparsify(gpt2.dense(), gpt2.schedule(0.5), **EAGER)
    model(gpt2.tokens)
    before = graphs()
    for target in (0.2, 0.8, 0.0):
        was_fx.sparsify(model, gpt2.schedule(target), **EAGER)
        close(model(gpt2.tokens), gpt2.oracle(target)(gpt2.tokens))
    assert graphs() == before


def test_numbers_of_a_compiled_model_are_those_of_its_last_schedule(llama):
    model = llama.sparse(0.5)
    fast = torch.compile(model.model.layers[0].mlp, backend="was", options=EAGER)
    x = torch.randn(1, 5, 64)
    fast(x)
    was_fx.sparsify(model, llama.schedule(0.2), **EAGER)
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
    was_fx.sparsify(model, subject.schedule(), **EAGER)
    close(fast(subject.tokens), subject.oracle()(subject.tokens))


def test_weights_of_a_merged_call_lie_one_after_the_other(llama):
    model = llama.sparse()
    before = {name: (id(p), p.clone(), p.stride()) for name, p in model.named_parameters()}
    torch.compile(model, backend="was", options=EAGER)(llama.tokens)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for first, second in (
            (attention.q_proj.weight, attention.k_proj.weight),
            (attention.k_proj.weight, attention.v_proj.weight),
            (mlp.gate_proj.weight, mlp.up_proj.weight),
        ):
            assert follows(first, second)
            (one,), (two,) = bindings(first).values(), bindings(second).values()
            assert follows(one.threshold, two.threshold)
    for name, parameter in model.named_parameters():
        identity, value, stride = before[name]
        assert (id(parameter), parameter.stride()) == (identity, stride)
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefil": "all"}, r"""backend "was" has no option 'prefil'; did you mean 'prefill'\?"""),
        (
            {"no such option": 1},
            r"its own are compile_prompts, cuda_graphs, disable, executor, lists, observe, prefill, schedule",
        ),
        ({"executor": "aot"}, "executor is 'aot'; it must be 'inductor' or 'eager'"),
        ({"prefill": "some"}, "prefill is 'some'; it must be one of dense, sparse, half, all"),
        ({"disable": ("merge",), "executor": "eager"}, "disable names merge; the passes to choose from are"),
        (
            {"disable": ("choose_phase",), "executor": "eager"},
            "disable names choose_phase; the passes to choose from are",
        ),
    ],
)
def test_bad_option_is_a_value_error_that_names_the_valid_ones(options, message):
    fast = torch.compile(nn.Linear(4, 4), backend="was", options=options)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        fast(torch.randn(1, 4))
    assert type(caught.value.inner_exception) is ValueError


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({}, "prefill", "dense"),
        ({}, "executor", "inductor"),
        ({"prefill": "half"}, "prefill", "half"),
        ({"disable": ["merge_siblings"]}, "disable", ["merge_siblings"]),
        ({"max_autotune": True, "observe": True}, "inductor", {"max_autotune": True}),
        ({"triton.cudagraphs": True}, "inductor", {"triton.cudagraphs": True}),
    ],
)
def test_options_are_ours_or_those_of_inductor(options, field, value):
    assert getattr(BackendOptions.parse(options), field) == value


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_modes_stand_for_options_of_inductor(mode):
    known = torch._inductor.list_mode_options(mode) if mode else {}
    assert mode_options(mode) == known
    assert BackendOptions.parse(mode_options(mode)).inductor == known


def test_mode_of_a_sparsified_model(gpt2):
    model = was_fx.sparsify(gpt2.dense(), gpt2.schedule(), mode="reduce-overhead", **EAGER)
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


@pytest.mark.parametrize("known", [True, False])
def test_compiler_is_looked_for(monkeypatch, known):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def get_cpp_compiler():
        if not known:
            raise InvalidCxxCompiler
        return "g++"

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
    assert has_compiler() is known


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_inductor_with_a_mode_and_changing_numbers(llama):
    model = llama.sparse()
    fast = torch.compile(model.model.layers[0].mlp, backend="was", mode="reduce-overhead")
    step = torch.randn(1, 1, 64)
    close(fast(step), llama.oracle().model.layers[0].mlp(step))
    was_fx.sparsify(model, llama.schedule(0.2), **EAGER)
    close(fast(step), llama.oracle(0.2).model.layers[0].mlp(step))
    assert graphs() == 1


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_inductor_on_a_prompt_with_dense_tokens_that_is_observed(llama):
    model = llama.sparse()
    options = {"prefill": "half", "observe": True}
    fast = torch.compile(model.model.layers[0].mlp, backend="was", options=options, dynamic=True)
    x = torch.randn(2, 6, 64)
    y = fast(x)
    close(y[:, :3], llama.dense().model.layers[0].mlp(x)[:, :3])
    close(y[:, 3:], llama.oracle().model.layers[0].mlp(x)[:, 3:])
    (binding,) = bindings(model.model.layers[0].mlp.up_proj.weight).values()
    dropped = (x[:, 3:].abs() <= binding.threshold).sum()
    assert binding.counts.tolist() == [dropped, 2 * 3 * 64]

"""Experts held as 3-D parameters: what they compute when they are sparse, against an oracle written apart."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.kernels.parts.served import noting_served
from was_fx.modules.linears import (
    bytes_per_token,
    dense_expert_parameters,
    find_linears,
    looking_at_inputs,
    weight_bytes_per_token,
)
from was_fx.modules.sparse_experts import SparseExperts, sparse_experts_modules
from was_fx.schedules.experts import groups

# Plain; biases, transposed and interleaved, beside an attention with sinks; without a gate; shared experts; a gate of
# its own with transposed weights.
FEW = ("mixtral", "gpt_oss", "qwen2_moe")


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def oracle(model: nn.Module, schedule) -> nn.Module:
    """A dense copy whose experts run one by one, and whose Linears and experts see weak channels as zeros."""
    copied = copy.deepcopy(model)

    def threshold(name: str, weight: torch.Tensor) -> torch.Tensor:  # weight [N, K]
        entry = schedule.linears[name]
        norms = weight.double().abs().sum(0) if schedule.norm == 1 else weight.double().square().sum(0).sqrt()
        return (entry.threshold / norms**entry.exponent).float()

    def zeroed(name: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.abs() <= threshold(name, weight), 0, x) if name in schedule.linears else x

    def forward(path, module, x, index, weights):
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for e, share in zip(index[token].tolist(), weights[token], strict=True):
                if e >= module.num_experts:
                    continue
                row = x[token]
                for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                    weight = getattr(module, name)[e]
                    weight = weight.t() if module.is_transposed else weight
                    row = weight @ zeroed(f"{path}.{name}[{e}]", weight, row)
                    row = row + getattr(module, f"{name}_bias")[e] if module.has_bias else row
                    if name != "down_proj":
                        row = module._apply_gate(row[None])[0] if module.has_gate else module.act_fn(row)
                y[token] += share * row
        return y

    experts = experts_of(copied)
    for path, module in experts.items():
        module.forward = lambda *given, path=path, module=module: forward(path, module, *given)
    for name in schedule.linears:
        if "[" not in name:
            module = copied.get_submodule(name)
            module.register_forward_pre_hook(lambda m, given, name=name: (zeroed(name, m.weight, given[0]), *given[1:]))
    return copied


@pytest.fixture(scope="module")
def made():
    """A model and its calibration, by model type; both are to be copied."""
    known: dict[str, tuple] = {}

    def build(model_type: str = "mixtral"):
        if model_type not in known:
            model = tiny_model(model_type)
            tokens = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
            known[model_type] = model, was_fx.calibrate(model, tokens), tokens
        model, calibration, tokens = known[model_type]
        return copy.deepcopy(model), calibration, tokens

    return build


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", FEW)
def test_a_model_is_its_oracle_at_50_percent_and_dense_at_0(made, model_type):
    model, calibration, tokens = made(model_type)
    schedule = was_fx.uniform(calibration, 0.5)
    scheduled = groups(schedule.linears)
    assert {f"{path}.down_proj" for path in experts_of(model)} <= set(scheduled)
    assert not dense_expert_parameters(model)
    dense, expected = logits(model, tokens[:1]), logits(oracle(model, schedule), tokens[:1])
    few = logits(oracle(model, schedule), tokens[:1, :3])
    was_fx.sparsify(model, schedule, prefill="all")
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(dense.abs().max())}
    torch.testing.assert_close(logits(model, tokens[:1]), expected, **tolerance)
    torch.testing.assert_close(logits(model, tokens[:1, :3]), few, **tolerance)
    assert (expected - dense).abs().max() > 0.01 * dense.abs().max()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.0), prefill="all")
    torch.testing.assert_close(logits(model, tokens[:1]), dense, **tolerance)


def test_prompts_are_dense_and_steps_sparse(made):
    model, calibration, tokens = made()
    schedule, dense = was_fx.uniform(calibration, 0.5), copy.deepcopy(model)
    sparse = oracle(model, schedule)
    was_fx.sparsify(model, schedule)
    with torch.no_grad():
        prompt, expected = (each(input_ids=tokens[:1, :9], use_cache=True) for each in (model, dense))
        torch.testing.assert_close(prompt.logits, expected.logits)
        steps = [
            each(input_ids=tokens[:1, 9:10], past_key_values=copy.deepcopy(expected.past_key_values)).logits
            for each in (model, sparse, dense)
        ]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-4)
    assert (steps[1] - steps[2]).abs().max() > 0.01 * steps[2].abs().max()


def test_undone_everything_is_as_before(made):
    model, calibration, tokens = made()
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    kinds, dense = [type(module) for module in model.modules()], logits(model, tokens[:1])
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    for module in sparse_experts_modules(model).values():
        assert module.gate_up_proj.mT.is_contiguous()  # rows are input channels, shapes as ever
        assert module.gate_up_proj.shape == (4, 192, 64)
    assert list(model.state_dict()) == list(before)
    assert len(sparse_experts_modules(model)) == 2
    was_fx.densify(model)
    assert [type(module) for module in model.modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
    assert not any(name.startswith("was_") for module in model.modules() for name in vars(module))
    assert torch.equal(logits(model, tokens[:1]), dense)


def test_experts_that_are_left_out_keep_every_channel(made):
    model, calibration, tokens = made()
    left_out = "model.layers.1.mlp.experts.gate_up_proj[2]"
    schedule = was_fx.uniform(calibration, 0.5, exclude=[left_out, "model.layers.0.mlp.experts.down_proj"])
    assert left_out not in schedule.linears
    assert not any("0.mlp.experts.down_proj" in name for name in schedule.linears)
    expected = logits(oracle(model, schedule), tokens[:1])
    was_fx.sparsify(model, schedule, prefill="all")
    torch.testing.assert_close(logits(model, tokens[:1]), expected, rtol=1e-4, atol=1e-4)


def as_copy(model):
    return copy.deepcopy(model)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [as_copy, through_pickle])
def test_a_copy_is_sparse(made, copied):
    model, calibration, tokens = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5), prefill="all")
    again = copied(model)
    assert isinstance(again.model.layers[0].mlp.experts, SparseExperts)
    torch.testing.assert_close(logits(again, tokens[:1]), logits(model, tokens[:1]))


def test_thresholds_stay_fp32_in_another_dtype(made):
    model, calibration, tokens = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5), prefill="all")
    module = model.model.layers[0].mlp.experts
    before = module.was_threshold_down_proj.clone()
    model.to(torch.bfloat16)
    assert module.was_threshold_down_proj.dtype == torch.float32
    assert torch.equal(module.was_threshold_down_proj, before)
    assert logits(model, tokens[:1]).isfinite().all()


def test_weights_that_are_loaded_anew_take_thresholds_of_their_own(made):
    model, calibration, tokens = made()
    schedule = was_fx.uniform(calibration, 0.5)
    other = tiny_model("mixtral", seed=1)
    expected = logits(oracle(other, schedule), tokens[:1])
    was_fx.sparsify(model, schedule, prefill="all")
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, tokens[:1]), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_changed_in_place_is_noticed(made):
    model, calibration, tokens = made()
    schedule = was_fx.uniform(calibration, 0.5)
    changed = copy.deepcopy(model)
    for each in (changed, model):
        if each is model:
            was_fx.sparsify(model, schedule, prefill="all")
        each.model.layers[0].mlp.experts.down_proj.data[3] *= 3
    expected = logits(oracle(changed, schedule), tokens[:1])
    torch.testing.assert_close(logits(model, tokens[:1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm", "was"])
def test_whatever_function_the_configuration_names_it_is_sparse(made, name):
    model, calibration, tokens = made()
    schedule = was_fx.uniform(calibration, 0.5)
    expected = logits(oracle(model, schedule), tokens[:1])
    dense = logits(model, tokens[:1])
    was_fx.sparsify(model, schedule)
    model.set_experts_implementation(name)
    torch.testing.assert_close(logits(model, tokens[:1]), dense, rtol=1e-4, atol=1e-4)
    was_fx.sparsify(model, schedule, prefill="all")
    torch.testing.assert_close(logits(model, tokens[:1]), expected, rtol=1e-4, atol=1e-4)


def test_ours_is_a_function_of_the_registry_and_dense_where_nothing_is_sparse(made):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, _, tokens = made()
    dense = logits(model, tokens[:1])
    assert "was" in ALL_EXPERTS_FUNCTIONS
    model.set_experts_implementation("was")
    torch.testing.assert_close(logits(model, tokens[:1]), dense)


def test_experts_of_other_ranks_count_for_nothing(made):
    model, calibration, _ = made()
    module = model.model.layers[0].mlp.experts
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 4], [4, 2], [1, 3]]), torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    schedule = was_fx.uniform(calibration, 0.5)
    expected = experts_of(oracle(model, schedule))["model.layers.0.mlp.experts"].forward(x, index, weights)
    was_fx.sparsify(model, schedule, prefill="all")
    torch.testing.assert_close(module(x, index, weights), expected)


def test_gradients_flow(made):
    model, calibration, tokens = made()
    schedule = was_fx.uniform(calibration, 0.5)
    plain = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all")
    for each in (plain, model):
        each(input_ids=tokens[:1, :6], labels=tokens[:1, :6]).loss.backward()
    found, expected = (each.model.layers[1].mlp.experts.down_proj.grad for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_under_autocast(made):
    model, calibration, _ = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5), prefill="all")
    module = model.model.layers[0].mlp.experts
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 1], [3, 2], [1, 3]]), torch.full((3, 2), 0.5)
    expected = module(x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, index, weights)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_inputs_are_those_of_each_experts_own_tokens(made):
    model, _, tokens = made()
    linears = find_linears(model)
    names = [f"model.layers.0.mlp.experts.{each}_proj[{e}]" for each in ("gate_up", "down") for e in range(4)]
    seen: dict[str, int] = {}
    dense = logits(model, tokens[:1])
    with looking_at_inputs({name: linears[name] for name in names}, lambda name, x: seen.update({name: len(x)})):
        looked = logits(model, tokens[:1])
    torch.testing.assert_close(looked, dense)
    assert sum(seen.get(name, 0) for name in names[:4]) == sum(seen.get(name, 0) for name in names[4:]) == 2 * 48
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_realised_sparsity_and_check_know_experts(made):
    model, calibration, tokens = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    found = was_fx.evaluate(model, tokens[:2])
    assert 0.45 < found.realised < 0.55
    assert 0.4 < found.linears["model.layers.1.mlp.experts.down_proj[0]"] < 0.6
    report = was_fx.check(model)
    assert report.ok
    assert report.path == "eager"
    rows = {row.name: row for row in report.linears}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].tokens == 7
    assert not any("[" in name for name in rows)
    linears = find_linears(model)
    scheduled = sum(bytes_per_token(model, linears[name]) for name in model._was_state.schedule.linears)
    assert report.bytes_saved == pytest.approx(report.realised * scheduled / weight_bytes_per_token(model), rel=1e-3)


def test_of_few_tokens_each_experts_kept_rows_are_gathered(made):
    model, calibration, tokens = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5), prefill="all")
    with noting_served() as served:
        logits(model, tokens[:1, :1])
    down = model.model.layers[0].mlp.experts.down_proj
    addresses = {down[e].data_ptr() for e in range(4)}
    assert sum(bool(addresses & set(each.weights)) for each in served) == 2  # its two experts
    assert {each.implementation for each in served if addresses & set(each.weights)} <= {
        "cpu_gather",
        "cpu_embedding_bag",
    }


def test_a_checkpoint_is_loaded_sparse(made, tmp_path):
    from transformers import AutoModelForCausalLM

    model, calibration, tokens = made()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    with torch.no_grad():
        expected = model.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(sparse_experts_modules(again)) == 2
    assert torch.equal(again.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False), expected)


def test_a_module_of_other_weights_is_no_experts_module():
    from was_fx.modules.experts import is_experts

    module = tiny_model("mixtral").model.layers[0].mlp.experts
    assert is_experts(module)
    module._is_expert_parallel = True
    assert not is_experts(module)
    module._is_expert_parallel = False
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert not is_experts(module)
    assert not is_experts(SimpleNamespace())


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_quantised_experts_are_the_oracle_of_their_weights(model_type, format, made):
    model, _, tokens = made(model_type)
    was_fx.quantize(model, {"*experts*": format})
    plain, held = made(model_type)[0], find_linears(model)
    for name, linear in find_linears(plain).items():
        if linear.expert is not None:
            assert held[name].rows is not None
            linear.matrix.data.copy_(held[name].weight.t() if linear.input_major else held[name].weight)
    tolerance = {
        "rtol": 1e-4,
        "atol": (0.05 if format == "int4" else 1e-4) * float(logits(plain, tokens[:1]).abs().max()),
    }
    torch.testing.assert_close(logits(model, tokens[:1]), logits(plain, tokens[:1]), **tolerance)
    calibration = was_fx.calibrate(model, tokens)
    schedule = was_fx.uniform(calibration, 0.5)
    module = experts_of(model)["model.layers.0.mlp.experts"]
    before = module.down_proj_codes.clone()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 1], [3, 2]]), torch.full((2, 2), 0.5)
    was_fx.sparsify(model, schedule, prefill="all")
    expected = experts_of(oracle(plain, schedule))["model.layers.0.mlp.experts"].forward(x, index, weights)
    found = module(x, index, weights)
    assert (found - expected).abs().max() < (0.02 if format == "int4" else 1e-4) * expected.abs().max()
    assert was_fx.check(model).ok
    was_fx.densify(model)
    assert torch.equal(module.down_proj_codes, before)
    assert "down_proj" not in dict(module.named_parameters())


def test_experts_of_one_parameter_need_one_format(made):
    model, _, _ = made()
    with pytest.raises(ValueError, match="need one format"):
        was_fx.quantize(model, {"model.layers.0.mlp.experts.down_proj[[]1]": "int8"})
    assert not any(hasattr(module, "down_proj_codes") for module in model.modules())


def test_quantised_experts_are_not_saved_yet(made, tmp_path):
    model, _, _ = made()
    was_fx.quantize(model, "int8")
    with pytest.raises(ValueError, match="experts"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())

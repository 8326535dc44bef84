"""What a model would run by is what it does run by."""

import copy

import pytest
import torch

import was_fx
from was_fx.doctor.kernel_plan import kernel_plan
from was_fx.measure.sequential import uniform_while_dropping
from was_fx.modules.linears import find_linears
from was_fx.schedules.experts import group_of

CPU = torch.device("cpu")


def skeleton(model):
    with torch.device("meta"):
        return type(model)(model.config)


def by_name(plan):
    return {linear: use for use in plan for linear in use.linears}


def schedule_of(model, target=0.5, **choice):
    ids = torch.randint(model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    return was_fx.uniform(was_fx.calibrate(model, ids, **choice), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_plan_names_the_kernels_that_serve(llama, dtype, weights):
    model = llama.to(dtype)
    empty = skeleton(model)
    if weights:
        was_fx.quantize(model, weights)
    schedule = schedule_of(model)
    found = by_name(kernel_plan(empty, CPU, dtype, schedule=schedule, weights=weights))
    report = was_fx.check(was_fx.sparsify(model, schedule))
    assert report.ok
    for row in report.linears:
        use = found[row.name]
        assert (use.implementation, use.reason) == (row.implementation, row.reason)
        assert use.sparse
        assert use.served
        low, high = use.nominal
        assert low <= row.nominal <= high
    assert found.keys() == {group_of(name) for name in find_linears(model)}


def test_the_head_and_what_a_schedule_leaves_out_are_dense_with_a_reason(llama):
    schedule = schedule_of(llama, exclude=["*.o_proj"])
    plan = kernel_plan(skeleton(llama), CPU, torch.float32, schedule=schedule)
    dense = {use.name: use.reason for use in plan if not use.sparse}
    assert dense == {
        "o_proj": "left out when the schedule was made",
        "lm_head": "the output head, which stays dense unless it is scheduled",
    }
    assert {use.name for use in plan if use.sparse} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_without_a_schedule_all_but_the_head_are_sparse(llama):
    plan = kernel_plan(skeleton(llama), CPU, torch.float32)
    assert {use.name for use in plan if not use.sparse} == {"lm_head"}
    assert all(use.nominal is None for use in plan)
    assert sum(len(use.linears) for use in plan) == 15


def test_outputs_that_int4_does_not_divide_are_a_problem(llama):
    config = copy.deepcopy(llama.config)
    config.intermediate_size = 100
    with torch.device("meta"):
        model = type(llama)(config)
    plan = {use.name: use for use in kernel_plan(model, CPU, torch.float32, weights="int4")}
    assert "100 outputs, which groups of 32 don't divide; choose int8" in plan["up_proj"].problem
    assert plan["down_proj"].problem == ""
    assert plan["down_proj"].weights == "int4-32"
    assert not plan["up_proj"].sparse


def test_a_dtype_without_a_kernel_is_said_to_be_no_faster(llama):
    plan = kernel_plan(skeleton(llama), CPU, torch.float64)
    assert {use.served for use in plan if use.sparse} == {False}
    assert "float64" in plan[0].reason


@pytest.mark.parametrize("weights", [None, "int8"])
def test_experts_are_one_line_and_their_router_is_named(weights):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    empty = skeleton(model)
    if weights:
        was_fx.quantize(model, weights)
    ids = torch.randint(64, (2, 16))
    schedule = uniform_while_dropping(model, ids, 0.5)
    found = by_name(kernel_plan(empty, CPU, torch.float32, schedule=schedule, weights=weights))
    report = was_fx.check(was_fx.sparsify(model, schedule))
    experts = [row for row in report.linears if row.name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    for row in experts:
        assert (found[row.name].implementation, found[row.name].reason) == (row.implementation, row.reason)
    assert "no Linear" in found["model.layers.0.mlp.gate.weight"].reason

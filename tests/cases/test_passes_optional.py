"""Without any of its optional passes a compiled model computes the same."""

import copy

import pytest
import torch

import was_fx

OPTIONAL = (
    "merge_siblings",
    "list_channels",
    "fuse_attention",
    "fuse_rms_norms",
    "fuse_gated_products",
    "batch_counters",
)
LEFT_OUT = [(), *((name,) for name in OPTIONAL), OPTIONAL]


def names(disable):
    return "all of them" if len(disable) > 1 else "".join(disable) or "none"


@pytest.mark.parametrize("disable", LEFT_OUT, ids=names)
def test_a_prompt(case, disable):
    options = {"lowering": "eager", "disable": disable}
    fast = torch.compile(case.sparse(prefill="all"), backend="was", options=options)
    found, expected, dense = (case.logits(each, case.prompt) for each in (fast, case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)


@pytest.mark.parametrize(
    ("disable", "kind"),
    [*((each, "static") for each in LEFT_OUT), ((), "dynamic"), (OPTIONAL, "dynamic")],
    ids=lambda value: value if isinstance(value, str) else names(value),
)
def test_decode_steps(block, disable, kind):
    options = {"lowering": "eager", "disable": disable}
    fast = torch.compile(block.sparse(), backend="was", options=options)
    ids = block.prompt[:, :11]
    found, expected, dense = (
        block.steps(each, ids, kind=kind) for each in (fast, block.oracle("dense"), block.dense())
    )
    block.assert_close(found[:, :8], dense[:, :8])
    block.assert_sparse(found[:, 8:], expected[:, 8:], dense[:, 8:])


@pytest.mark.parametrize("disable", [OPTIONAL[:1], OPTIONAL], ids=names)
def test_the_models_own_compiled_call(case, disable):
    model = case.sparse(lowering="eager", disable=disable)
    found = case.greedy(model, case.prompt)
    assert found.equal(case.greedy(case.oracle("dense"), case.prompt))
    assert not found.equal(case.greedy(case.dense(), case.prompt))
    assert was_fx.check(model, case.prompt).ok


@pytest.mark.parametrize("as_path", [False, True], ids=["Schedule", "path"])
@pytest.mark.parametrize("disable", [(), OPTIONAL], ids=names)
def test_a_dense_model_with_a_schedule(case, disable, as_path, tmp_path):
    schedule = case.schedule
    if as_path:
        schedule = tmp_path / "schedule.was.safetensors"
        case.schedule.save(schedule)
    model = case.dense()
    options = {"lowering": "eager", "disable": disable, "schedule": schedule, "prefill": "all"}
    fast = torch.compile(model, backend="was", options=options)
    found, expected, dense = (case.logits(each, case.prompt) for each in (fast, case.oracle(), case.dense()))
    case.assert_sparse(found, expected, dense)
    assert all(value.equal(case.dense().state_dict()[name]) for name, value in model.state_dict().items())


def test_the_decode_steps_of_a_dense_model_with_a_schedule(block):
    options = {"lowering": "eager", "disable": OPTIONAL, "schedule": block.schedule}
    fast = torch.compile(block.dense(), backend="was", options=options)
    found, expected, dense = (block.steps(each, block.prompt) for each in (fast, block.oracle("dense"), block.dense()))
    block.assert_close(found[:, :8], dense[:, :8])
    block.assert_sparse(found[:, 8:], expected[:, 8:], dense[:, 8:])


@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_models_of_other_kinds(request, kind):
    case = request.getfixturevalue(kind)
    for disable in ((), OPTIONAL):
        options = {"lowering": "eager", "disable": disable}
        fast = torch.compile(case.sparse(prefill="all"), backend="was", options=options)
        found, expected, dense = (case.logits(each, case.prompt) for each in (fast, case.oracle(), case.dense()))
        case.assert_sparse(found, expected, dense)
        torch.compiler.reset()


def test_a_schedule_for_a_model_that_is_sparse_already_is_refused(case):
    other = was_fx.uniform(case.calibration, 0.3)
    fast = torch.compile(case.sparse(prefill="all"), backend="was", options={"lowering": "eager", "schedule": other})
    with pytest.raises(Exception, match=r"sparsified|schedule|thresholds"):
        case.logits(fast, case.prompt)


def test_two_models_of_one_shape_keep_their_own_schedules(block):
    schedules = {target: was_fx.uniform(block.calibration, target) for target in (0.3, 0.7)}
    models = {target: block.sparse(schedule, prefill="all") for target, schedule in schedules.items()}
    fast = {
        target: torch.compile(model, backend="was", options={"lowering": "eager"}) for target, model in models.items()
    }
    for target in (0.3, 0.7, 0.3):
        expected = block.logits(block.oracle(schedule=schedules[target]), block.prompt)
        block.assert_close(block.logits(fast[target], block.prompt), expected)
    copied = copy.deepcopy(models[0.3])
    was_fx.densify(models[0.3])
    block.assert_close(block.logits(fast[0.3], block.prompt), block.logits(block.dense(), block.prompt))
    expected = block.logits(block.oracle(schedule=schedules[0.3]), block.prompt)
    block.assert_close(block.logits(copied, block.prompt), expected)

"""sparsify and densify: what must be equal, what must not change, what is refused."""

import copy

import pytest
import torch

import was_fx
from was_fx.compat.dynamo import graphs_compiled
from was_fx.schedules.files.schedule import LinearSchedule, Schedule

TOLERANCE = {torch.float32: dict(atol=2e-4, rtol=1e-4), torch.bfloat16: dict(atol=0.25, rtol=0.05)}
NOWHERE = "model.layers.9.mlp.up_proj"


def mixed(schedule: Schedule) -> Schedule:
    """The same schedule with unlike exponents, a dense Linear and a per-channel override."""
    names = list(schedule.linears)
    first = schedule.linears[names[0]]
    channels = torch.linspace(0, 1, schedule.shapes[names[1]][1])
    return schedule.replace(
        {
            names[0]: LinearSchedule(first.sparsity, first.threshold, 0.5),
            names[1]: LinearSchedule(0.5, 0.0, 1.0, channel_threshold=channels),
            names[2]: LinearSchedule(0.0, 0.0, 1.0),
        }
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sparsity_zero_gives_the_dense_logits(llama, tokens, dtype):
    model = llama.to(dtype)
    dense = copy.deepcopy(model)
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.0)
    was_fx.sparsify(model, schedule, prefill="all")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "score", "target"),
    [
        (torch.float32, was_fx.Score(1.0, 1), 0.5),
        (torch.float32, was_fx.Score(0.0, 1), 0.3),
        (torch.float32, was_fx.Score(0.7, 2), 0.75),
        (torch.bfloat16, was_fx.Score(1.0, 1), 0.75),
    ],
    ids=str,
)
def test_logits_equal_the_oracle(llama, oracle, tokens, dtype, score, target):
    model = llama.to(dtype)
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens, score=score), target=target)
    expected = oracle(model, schedule)
    was_fx.sparsify(model, schedule, prefill="all")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, **TOLERANCE[dtype])


def test_each_linear_follows_its_own_entry(llama, calibration, tokens):
    model = llama
    schedule = mixed(was_fx.uniform(calibration, target=0.5))
    dense = copy.deepcopy(model)
    was_fx.sparsify(model, schedule, prefill="all")
    evaluation = was_fx.evaluate(model, tokens, prefill="all")
    names = list(schedule.linears)
    channels = schedule.linears[names[1]].channel_threshold
    module = dense.get_submodule(names[1])
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        dense(tokens)
    # The first block's Linears see the same input in the dense model: the second one's override must be in force.
    assert evaluation.linears[names[1]] == pytest.approx((seen[0].abs() <= channels).float().mean().item(), abs=0.01)
    assert evaluation.linears[names[2]] < 0.001


@pytest.mark.parametrize("run_first", [False, True], ids=["at once", "after a run"])
def test_densify_restores_weights_strides_flags_and_outputs(llama, calibration, tokens, run_first):
    model = llama
    model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model)
    was_fx.sparsify(model, was_fx.uniform(calibration, target=0.5))
    if run_first:
        model.generate(tokens[:1, :8], max_new_tokens=2, do_sample=False)
    assert was_fx.densify(model) is model
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.equal(then), name
        assert now.stride() == then.stride(), name
        assert now.requires_grad == then.requires_grad, name
        assert now.untyped_storage().nbytes() == then.untyped_storage().nbytes(), name
    assert_untouched(model, before)
    with torch.no_grad():
        assert model(tokens).logits.equal(before(tokens).logits)


def test_state_dict_keys_and_values_are_those_of_the_dense_model(llama, calibration, tokens):
    before = copy.deepcopy(llama.state_dict())
    model = was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    model.generate(tokens[:1, :8], max_new_tokens=2, do_sample=False)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """Its call is compiled by the backend, its graphs run node by node."""
    model.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    return model


def test_nothing_is_compiled_on_a_cpu_unless_asked_for(llama, calibration, tokens):
    before = graphs_compiled()
    model = was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    model.generate(tokens[:1, :9], max_new_tokens=3, do_sample=False)
    model.generate(tokens[:1, :9], max_new_tokens=3, do_sample=False, cache_implementation="static")
    was_fx.evaluate(model, tokens)
    was_fx.check(model)
    assert graphs_compiled() == before


def test_new_numbers_compile_nothing_and_take_effect(llama, calibration, oracle, tokens):
    other = was_fx.uniform(calibration, target=0.7)
    expected = oracle(llama, other)
    model = compiled(was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.2), prefill="all"))
    model.generate(tokens[:1, :9], max_new_tokens=3, do_sample=False)
    graphs = graphs_compiled()
    was_fx.sparsify(model, other, prefill="all")
    got = model.generate(tokens[:1, :9], max_new_tokens=6, do_sample=False)
    assert got.equal(expected.generate(tokens[:1, :9], max_new_tokens=6, do_sample=False))
    assert graphs_compiled() == graphs


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_second_generate_compiles_nothing(llama, calibration, tokens, cache):
    before = graphs_compiled()
    model = compiled(was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5)))
    arguments = dict(max_new_tokens=4, min_new_tokens=4, cache_implementation=cache)
    model.generate(tokens[:1, :9], do_sample=False, **arguments)
    graphs = graphs_compiled()
    model.generate(tokens[:1, :9], do_sample=False, **arguments)
    model.generate(tokens[:1, :9], do_sample=True, **arguments)
    assert graphs_compiled() == graphs
    assert graphs > before


def test_other_prompt_lengths_compile_nothing_with_the_dynamic_cache(llama, calibration, tokens):
    model = compiled(was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5)))
    model.generate(tokens[:1, :9], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    graphs = graphs_compiled()
    for length, new in ((12, 7), (30, 3), (3, 9)):
        model.generate(tokens[:1, :length], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert graphs_compiled() == graphs


@pytest.mark.parametrize("change", ["prefill", "Linears", "norm", "lowering"])
def test_sparsifying_again_is_as_the_first_time(llama, calibration, oracle, tokens, change):
    first, again = was_fx.uniform(calibration, target=0.5), was_fx.uniform(calibration, target=0.6)
    dense, how = copy.deepcopy(llama), {"prefill": "all"}
    if change == "Linears":
        first = was_fx.uniform(was_fx.calibrate(dense, tokens, exclude="*.k_proj"), target=0.5)
    if change == "norm":
        again = was_fx.uniform(was_fx.calibrate(dense, tokens, score=was_fx.Score(1.0, 2)), target=0.6)
    was_fx.sparsify(llama, first, prefill="dense" if change == "prefill" else "all")
    handles = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in llama.modules())
    was_fx.sparsify(llama, again, lowering="eager" if change == "lowering" else None, **how)
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in llama.modules()) == handles
    with torch.no_grad():
        expected = oracle(dense, again)(tokens).logits
        torch.testing.assert_close(llama(tokens).logits, expected, **TOLERANCE[torch.float32])
        was_fx.densify(llama)
        assert llama(tokens).logits.equal(dense(tokens).logits)
    for now, then in zip(llama.parameters(), dense.parameters(), strict=True):
        assert now.stride() == then.stride()


@pytest.mark.slow
def test_inductor_equals_the_oracle_in_prompt_and_decode(llama, calibration, oracle, tokens):
    schedule = mixed(was_fx.uniform(calibration, target=0.5))
    schedule = schedule.replace({list(schedule.linears)[1]: schedule.linears[list(schedule.linears)[3]]})
    expected = oracle(llama, schedule)
    model = was_fx.sparsify(llama, schedule, prefill="all", lowering="inductor")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, **TOLERANCE[torch.float32])
    arguments = dict(max_new_tokens=12, do_sample=False)
    assert model.generate(tokens[:1, :16], **arguments).equal(expected.generate(tokens[:1, :16], **arguments))


def refused(schedule: Schedule) -> dict[str, Schedule]:
    """Schedules that don't fit the embedded model, by what must be said of them."""
    linears, shapes = dict(schedule.linears), dict(schedule.shapes)
    first, last = next(iter(linears)), list(linears)[-1]
    extra = {**linears, NOWHERE: linears[first]}, {**shapes, NOWHERE: (8, 8)}
    missing = {n: e for n, e in linears.items() if n != last}, {n: s for n, s in shapes.items() if n != last}
    reshaped = linears, {**shapes, first: (3, 5)}
    return {
        NOWHERE: Schedule(*extra, schedule.norm),
        last: Schedule(*missing, schedule.norm),
        "[3, 5]": Schedule(*reshaped, schedule.norm),
    }


def assert_untouched(model: torch.nn.Module, before: torch.nn.Module) -> None:
    """Dense, with no trace of us."""
    for now, then in zip(model.modules(), before.modules(), strict=True):
        assert type(now) is type(then)
        assert set(vars(now)) == set(vars(then))
        assert list(now._buffers) == list(then._buffers)
        assert now._non_persistent_buffers_set == then._non_persistent_buffers_set
        assert not now._forward_pre_hooks
        assert not now._forward_hooks


def test_a_schedule_that_does_not_fit_is_refused_and_the_model_untouched(llama, calibration):
    strides = [parameter.stride() for parameter in llama.parameters()]
    for expected, schedule in refused(was_fx.uniform(calibration, target=0.5)).items():
        with pytest.raises(was_fx.ScheduleError) as error:
            was_fx.sparsify(llama, schedule)
        assert expected in str(error.value)
    assert [parameter.stride() for parameter in llama.parameters()] == strides


def test_a_schedule_of_another_model_is_refused_unless_allowed(llama, calibration):
    schedule = was_fx.uniform(calibration, target=0.5)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(was_fx.ScheduleError, match="another model"):
        was_fx.sparsify(llama, schedule)
    was_fx.sparsify(llama, schedule, allow_other_model=True)


def test_a_failure_half_way_leaves_the_model_dense(llama, calibration, monkeypatch):
    from was_fx.modules import placement

    calls = []

    def fail(weight):
        calls.append(weight)
        if len(calls) == 5:
            raise MemoryError("no memory left")

    monkeypatch.setattr(placement, "to_input_major", fail)
    before = copy.deepcopy(llama)
    with pytest.raises(MemoryError):
        was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    assert len(calls) == 5
    assert_untouched(llama, before)
    for now, then in zip(llama.parameters(), before.parameters(), strict=True):
        assert now.stride() == then.stride()
        assert now.equal(then)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prefill="some"), "prefill is 'some'"),
        (dict(lowering="fast"), "lowering is 'fast'"),
        (dict(mode="fastest"), "mode"),
        (dict(disable=("insert",)), "disable names insert"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_untouched(llama, calibration, arguments, message):
    before = copy.deepcopy(llama)
    with pytest.raises((ValueError, RuntimeError), match=message):
        was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5), **arguments)
    assert_untouched(llama, before)


def test_a_model_without_linears_is_refused(calibration):
    with pytest.raises(ValueError, match="no Linear"):
        was_fx.sparsify(torch.nn.Embedding(3, 4), was_fx.uniform(calibration, target=0.5))


def test_generate_that_compiles_by_itself_equals_the_oracle(llama, calibration, oracle, tokens):
    from transformers import CompileConfig

    schedule = was_fx.uniform(calibration, target=0.5)
    expected = oracle(llama, schedule).generate(tokens[:1, :16], max_new_tokens=8, do_sample=False)
    was_fx.sparsify(llama, schedule, prefill="all")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    got = llama.generate(
        tokens[:1, :16], max_new_tokens=8, do_sample=False, cache_implementation="static", compile_config=config
    )
    assert got.equal(expected)

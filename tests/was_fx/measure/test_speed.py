"""`decode_speed` on a CPU and, where there is one, on a GPU; `TokenClock`; shapes to measure with."""

import pytest
import torch
from transformers import LlamaConfig

import was_fx
from was_fx.measure.shapes import SHAPES, config
from was_fx.measure.speed import decode_speed, random_model
from was_fx.measure.token_clock import TokenClock


@pytest.fixture(scope="module")
def tiny():
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )


def test_the_dense_row_and_one_per_target(tiny):
    runs = []
    rows = decode_speed(
        tiny,
        [0.5, 0.75],
        tokens=4,
        prompt=4,
        long_prompt=300,
        repetitions=2,
        lowering="eager",
        progress=lambda *done: runs.append(done),
    )
    assert [row.target for row in rows] == pytest.approx([0.0, 0.5, 0.75])
    assert [row.realised for row in rows] == pytest.approx([0.0, 0.5, 0.75], abs=0.1)
    assert all(len(row.repetitions) == 2 and row.ms == row.ms_per_token > 0 and row.prompt_ms > 0 for row in rows)
    assert rows[0].ratio == 1
    assert rows[1].ratio == pytest.approx(rows[0].ms / rows[1].ms)
    assert rows[0].bytes_per_token > rows[1].bytes_per_token > rows[2].bytes_per_token
    assert [row.first_generate_s is None for row in rows] == [False, False, True]
    assert {row.prompt_tokens for row in rows} == {128}, "no more than there are positions"
    assert all(row.repeatable and row.step_ms is row.kernels is row.peak_bytes is None for row in rows)
    assert runs[-1] == (9, 9)


def test_schedules_take_the_place_of_targets_and_a_text_that_of_random_tokens(tiny):
    model = random_model(tiny, dtype=torch.float32)
    text = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(1))
    schedule = was_fx.uniform(was_fx.calibrate(model, text), 0.6)
    settings = {"text": text, "tokens": 2, "prompt": 4, "repetitions": 1, "lowering": "eager"}
    rows = decode_speed(model, [schedule, 0.3], **settings)
    assert [row.target for row in rows] == pytest.approx([0.0, 0.6, 0.3])
    assert {row.prompt_tokens for row in rows} == {96}, "no more than the text has"
    other = schedule.replace({}, fingerprint={**schedule.metadata.fingerprint, "weights": "other"})
    with pytest.raises(was_fx.ScheduleError, match="another model"):
        decode_speed(model, [other], **settings)
    assert len(decode_speed(model, [other], allow_other_model=True, **settings)) == 2


def test_the_head_has_a_format_and_a_sparsity_of_its_own(tiny):
    settings = {"tokens": 2, "prompt": 4, "repetitions": 1, "with_dense": False, "lowering": "eager"}
    heads = [{}, {"weights": {"lm_head": "int8"}}, {"head": 0.5}, {"weights": {"lm_head": "int8"}, "head": 0.5}]
    plain, int8, sparse, both = (decode_speed(tiny, [0.5], **settings, **head)[0].bytes_per_token for head in heads)
    weight = tiny.vocab_size * tiny.hidden_size
    assert plain - int8 == pytest.approx(weight - 4 * tiny.vocab_size, abs=200)
    assert plain - sparse == pytest.approx(weight, rel=0.25)
    assert int8 - both == pytest.approx(weight / 2, rel=0.25)


def test_without_the_dense_model_there_is_no_ratio(tiny):
    (row,) = decode_speed(tiny, [0.5], tokens=2, prompt=4, repetitions=1, with_dense=False)
    assert row.target == 0.5
    assert row.ratio is None


@pytest.mark.slow
def test_the_dense_model_is_compiled_and_then_as_before(tiny):
    model = random_model(tiny, dtype=torch.float32)
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    dense, sparse = decode_speed(model, [0.5], tokens=2, prompt=2, repetitions=1)
    assert dense.first_generate_s > sparse.first_generate_s, "only the dense one is compiled on a CPU"
    assert model._compiled_call_impl is None
    after = model.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].stride() == stride for name, (value, stride) in before.items()
    )


def test_a_static_cache_on_a_cpu(tiny):
    rows = decode_speed(tiny, [0.5], tokens=3, prompt=4, repetitions=1, cache="static", lowering="eager")
    assert all(row.step_ms is None and row.ms_per_token > 0 for row in rows)


def test_recorded_steps_have_a_static_cache_and_their_first_ones_do_not_count(tiny, monkeypatch):
    from was_fx.generate.recorded_step import RecordedStep

    made, init = [], RecordedStep.__init__
    monkeypatch.setattr(RecordedStep, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0])
    settings = {"prompt": 4, "repetitions": 1, "with_dense": False, "lowering": "recorded"}
    (row,) = decode_speed(tiny, [0.5], tokens=25, **settings)
    assert made
    assert {step.declined for step in made} == {""}
    assert row.ms_per_token > 0
    with pytest.raises(ValueError, match="at least 25"):
        decode_speed(tiny, [0.5], tokens=24, **settings)


@pytest.mark.parametrize("arguments", [{"tokens": 1}, {"prompt": -1}, {"repetitions": 0}], ids=str)
def test_too_little_to_time_is_refused(tiny, arguments):
    with pytest.raises(ValueError, match="at least 2, 1 and 1"):
        decode_speed(tiny, [0.5], **arguments)


def test_a_sparsified_model_is_refused(llama, tokens):
    was_fx.sparsify(llama, was_fx.uniform(was_fx.calibrate(llama, tokens), 0.5))
    with pytest.raises(ValueError, match="densify"):
        decode_speed(llama, [0.5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_decode_steps_are_timed_too(tiny):
    model = random_model(tiny, device="cuda")
    dense, sparse = decode_speed(model, [0.5], prompt=64, tokens=25, repetitions=1)
    assert dense.step_ms == dense.ms > 0
    assert sparse.step_ms == sparse.ms > 0
    assert dense.ratio == 1
    assert dense.kernels > 0
    assert sparse.kernels > 0
    assert sparse.recompiled == 0
    assert dense.repeatable
    assert sparse.repeatable
    assert sparse.peak_bytes > 0


def test_a_clock_hands_on_what_it_notes():
    heard = []

    class Inner:
        def put(self, tokens):
            heard.append(tokens)

        def end(self):
            heard.append("end")

    clock = TokenClock(Inner())
    _, *new = given = [torch.tensor([[7, 8]]), *(torch.tensor([n]) for n in range(3))]
    for each in given:
        clock.put(each)
    clock.end()
    assert heard == [*given, "end"]
    assert [each.tolist() for each in clock.tokens] == [each.tolist() for each in new]
    assert len(clock.times) == 4
    assert len(clock.steps()) == 2


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_is_a_configuration(name):
    made = config(name, num_hidden_layers=1)
    assert made.num_hidden_layers == 1
    assert made.hidden_size % made.num_attention_heads == 0


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="choose one of llama-3-8b"):
        config("llama-9")

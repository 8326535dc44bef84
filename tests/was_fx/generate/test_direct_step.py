"""Steps that call the compiled graph past the model, where a decode step is taken for one that CUDA graphs replay."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import was_fx
from was_fx.generate.direct_step import DirectStep


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_from_the_third_step_on_the_graph_is_called_directly(
    sparse, tokens, on_gpu, equals_theirs, shortcuts, batch, do_sample
):
    twin = copy.deepcopy(sparse)
    model = on_gpu(sparse)
    for prompt in (tokens[:batch, :9], tokens[:batch, 5:17]):
        assert equals_theirs(model, twin, prompt, do_sample=do_sample)
    assert shortcuts == [(batch, 1, 128)] * (2 * (11 - 2))


def test_new_thresholds_reach_the_next_generation(sparse, calibration, tokens, on_gpu, new, shortcuts):
    was_fx.sparsify(sparse, was_fx.uniform(calibration, 0.0))
    on_gpu(sparse)
    dense = sparse.generate(tokens[:1, :9], **new)
    was_fx.sparsify(sparse, was_fx.uniform(calibration, 0.7))
    on_gpu(sparse)
    assert not sparse.generate(tokens[:1, :9], **new).equal(dense)
    assert len(shortcuts) == 2 * 9


def test_a_model_with_hooks_is_called_at_every_step(llama, schedule, tokens, on_gpu, equals_theirs, shortcuts):
    llama.model.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    twin = was_fx.sparsify(copy.deepcopy(llama), schedule)
    model = on_gpu(was_fx.sparsify(llama, schedule))
    assert equals_theirs(model, twin, tokens[:1, :9])
    assert not shortcuts


def doubled(module, inputs, output):
    return output * 2


CHANGES = {
    "hook": lambda model: model.model.norm.register_forward_hook(doubled),
    "module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
    "parameter": lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(-model.model.norm.weight)),
    "weight in place": lambda model: model.model.norm.weight.data.neg_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_callback_changes_takes_effect_at_the_next_step(
    sparse, tokens, on_gpu, equals_theirs, shortcuts, change
):
    twin = copy.deepcopy(sparse)

    def changing(model):
        def processor(ids, scores):
            if ids.shape[1] == 15:
                change(model)
            return scores

        return [processor]

    model = on_gpu(sparse)
    torch.manual_seed(0)
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = type(twin).generate(twin, tokens[:1, :9], logits_processor=changing(twin), **arguments)
    found = model.generate(tokens[:1, :9], logits_processor=changing(model), **arguments)
    assert found.equal(expected)
    assert shortcuts


def test_a_cache_that_counts_in_python_is_kept_up(tokens, on_gpu, equals_theirs, shortcuts):
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 128, "initializer_range": 0.1, "sliding_window": 8}
    model = MistralForCausalLM(MistralConfig(**small)).eval()
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens[:, :32]), 0.5)
    twin = was_fx.sparsify(copy.deepcopy(model), schedule)
    on_gpu(was_fx.sparsify(model, schedule))
    assert equals_theirs(model, twin, tokens[:1, :5])
    assert equals_theirs(model, twin, tokens[:1, :20])


def test_without_captured_steps_the_model_is_called(sparse, tokens, on_gpu, equals_theirs, monkeypatch):
    calls, logits = [], DirectStep.logits
    monkeypatch.setattr(DirectStep, "logits", lambda self, changing: calls.append(logits(self, changing)) or calls[-1])
    twin = copy.deepcopy(sparse)
    assert equals_theirs(on_gpu(sparse), twin, tokens[:1, :9])
    assert calls == [None] * 11

"""Small models of many architectures decode as the same model with the weak input channels set to zero."""

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn

import was_fx
from was_fx.compat.dynamo import linear_function, settings_for_models
from was_fx.compile.backend import register
from was_fx.kernels.linear.dense_linear import dense_linear
from was_fx.modules.linears import body_linears
from was_fx.passes import pipeline
from was_fx.schedules.experts import is_member

TOLERANCE = {"logits": 1e-5}
DENSE = (linear_function, dense_linear, torch.ops.was.dense_linear)
PROMPT, NEW = 12, 8

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
COMMON = {**SIZES, **TOKENS, "max_position_embeddings": 64}
FEED_FORWARD = {**COMMON, "intermediate_size": 96}
GROUPED = {**FEED_FORWARD, "num_key_value_heads": 2}

# Configuration, Linears scheduled, groups of siblings, and Linears in the graph that no schedule names.
ARCHITECTURES = {
    "Llama": (GROUPED, 14, 4, 1),
    "Mistral": (GROUPED, 14, 4, 1),
    "Qwen2": (GROUPED, 14, 4, 1),
    "Qwen3": ({**GROUPED, "head_dim": 16}, 14, 4, 1),
    "Gemma2": ({**GROUPED, "head_dim": 16}, 14, 4, 1),
    "Phi": (FEED_FORWARD, 12, 2, 1),
    "Phi3": (GROUPED, 8, 0, 1),
    "GPT2": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}, 8, 0, 1),
    "GPTNeoX": (FEED_FORWARD, 8, 0, 1),
    "OPT": ({**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}, 12, 2, 1),
    "Bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4, **TOKENS}, 8, 0, 1),
    "Falcon": ({**SIZES, **TOKENS}, 8, 2, 1),
    "StableLm": (GROUPED, 14, 4, 1),
    "Olmo2": (GROUPED, 14, 4, 1),
    "Cohere": (GROUPED, 14, 2, 1),
    "Mixtral": ({**GROUPED, "num_local_experts": 4}, 8, 2, 3),  # the routers and the head; experts are no Linears
}


def zero_weak_channels(module: nn.Module, args: tuple, threshold: float, norms: torch.Tensor) -> tuple:
    x, *rest = args
    return torch.where(x.abs() > threshold / norms, x, torch.zeros_like(x)), *rest


def oracle(model: nn.Module, schedule: was_fx.Schedule) -> nn.Module:
    """A copy of a dense model whose scheduled Linears see only the channels with |x_j| > τ / ‖W[:, j]‖₁."""
    model = copy.deepcopy(model)
    for name, entry in schedule.linears.items():
        module = model.get_submodule(name)
        outputs = 1 if type(module).__name__ == "Conv1D" else 0
        norms = module.weight.detach().abs().sum(outputs)
        module.register_forward_pre_hook(partial(zero_weak_channels, threshold=entry.threshold, norms=norms))
    return model


def generate(model: nn.Module, prompt: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuation [1, PROMPT + NEW], and the logits of its tokens [NEW, V]."""
    result = model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return result.sequences, torch.cat(result.logits)


def assert_alike(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    (tokens, logits), (expected_tokens, expected_logits) = found, expected
    assert torch.equal(tokens, expected_tokens)
    assert (logits - expected_logits).abs().max() < TOLERANCE["logits"] * expected_logits.abs().max()


@pytest.fixture
def contexts(monkeypatch):
    """What the passes did to each graph that is compiled; hooks that are traced by themselves compute nothing."""
    seen = []

    def observe(context):
        if context.module.graph.output_node().args[0]:
            seen.append(context)

    monkeypatch.setattr(pipeline, "observers", [observe])
    return seen


def compiled(model: nn.Module, schedule: was_fx.Schedule, **options) -> nn.Module:
    """The model sparsified, prompts too, and compiled by the passes alone."""
    register()
    was_fx.sparsify(model, schedule, prefill="all")
    model.compile(backend="was", dynamic=True, options={"lowering": "eager", **options})
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_equals_the_model_with_weak_channels_zeroed(name, contexts):
    settings, scheduled, groups, unscheduled = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens, prompt = torch.randint(2, 128, (2, 16)), torch.randint(2, 128, (1, PROMPT))

    # Experts held as one parameter are no modules that hooks of the oracle could see.
    experts = [each for each in body_linears(model) if is_member(each)]
    calibration = was_fx.calibrate(model, tokens, exclude=experts)
    schedule = was_fx.uniform(calibration, 0.5)
    dense, expected = generate(model, prompt), generate(oracle(model, schedule), prompt)
    assert not torch.allclose(dense[1], expected[1], rtol=1e-2)
    with settings_for_models():
        compiled(model, schedule)
        assert_alike(generate(model, prompt), expected)

        assert [context.decode for context in contexts] == [False, True]
        for context in contexts:
            assert context.counts["sparse"] == len(schedule.linears) == scheduled
            assert {call.name for call in context.calls} == set(schedule.linears)
            assert context.counts["merged groups"] == groups
            nodes = context.module.graph.nodes
            assert sum(node.target in DENSE for node in nodes) == unscheduled

        was_fx.sparsify(model, was_fx.uniform(calibration, 0.0), prefill="all")
        assert_alike(generate(model, prompt), dense)
        assert len(contexts) == 2  # other numbers, the same graphs


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Phi3"])
def test_generation_by_a_schedule_of_the_dense_model(name, contexts):
    settings, scheduled, *_ = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(2, 128, (1, PROMPT))
    schedule = was_fx.uniform(was_fx.calibrate(model, torch.randint(2, 128, (2, 16))), 0.5)
    expected = generate(was_fx.sparsify(copy.deepcopy(model), schedule), prompt)  # prompts are dense
    register()
    model.compile(backend="was", dynamic=True, options={"lowering": "eager", "schedule": schedule})
    with settings_for_models():
        for _ in range(2):
            assert_alike(generate(model, prompt), expected)
    assert {context.counts["dense (prompt)"] for context in contexts if not context.decode} == {scheduled}
    assert [context.counts["inserted"] for context in contexts if context.decode] == [scheduled]


# Fused norms, attentions, and gated products, in the two blocks of the decode step.
LISTED = {
    "Llama": (5, 2, 2),  # the last norm, before the head, adds the Linear before it
    "Qwen2": (5, 2, 2),
    "Qwen3": (5, 2, 2),
    "Gemma2": (4, 0, 2),  # its logits are capped, so its attention is written out
    "Gemma3Text": (4, 2, 2),
    "Olmo2": (0, 2, 2),  # its norms come after the Linears
    "Phi3": (4, 2, 2),
    "GPT2": (0, 2, 0),
}


@pytest.mark.parametrize(("name", "cache"), [*((name, "static") for name in LISTED), ("Llama", "dynamic")])
@pytest.mark.usefixtures("meanings")
def test_decoding_with_listed_channels_is_the_same(name, cache, contexts):
    known = ARCHITECTURES["Gemma2" if name == "Gemma3Text" else name][0]
    config = getattr(transformers, f"{name}Config")(**known)
    written_out = {"attn_implementation": "eager"} if name == "Gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **written_out).eval()
    prompt = torch.randint(2, 128, (1, PROMPT))
    schedule = was_fx.uniform(was_fx.calibrate(model, torch.randint(2, 128, (2, 16))), 0.5)
    expected = generate(oracle(model, schedule), prompt)
    compiled(model, schedule, lists=True)
    with settings_for_models():
        assert_alike(generate(model, prompt, cache_implementation=cache), expected)
    decode = contexts[-1]
    assert decode.decode
    assert decode.counts["listed"] == len(schedule.linears)
    passes = ("fused norms", "decode attention", "fused gated products")
    assert tuple(decode.counts[each] for each in passes) == LISTED[name]
    assert decode.counts["batched counters"] == (2 if cache == "static" else 0)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPT2"])
@pytest.mark.usefixtures("meanings")
def test_a_step_of_several_sequences_is_the_same_by_products_that_mask(name, contexts):
    known = ARCHITECTURES["Gemma2" if name == "Gemma3Text" else name][0]
    config = getattr(transformers, f"{name}Config")(**known)
    model = transformers.AutoModelForCausalLM.from_config(config).half().eval()
    prompt = torch.randint(2, 128, (3, PROMPT))
    schedule = was_fx.uniform(was_fx.calibrate(model, prompt), 0.5)
    logits = []
    for lists in (False, True):
        with settings_for_models():
            sparse = compiled(copy.deepcopy(model), schedule, lists=lists)
            found = generate(sparse, prompt, cache_implementation="static")
        logits.append(found[1].view(NEW, 3, -1)[:2].float())  # of the prompt, and of a step that read the same tokens
    assert (logits[1] - logits[0]).abs().max() < 2e-2 * logits[0].abs().max()
    decode = contexts[-1]
    assert decode.decode
    assert decode.counts["listed"] == len(schedule.linears)
    assert decode.counts["decode attention"] == 2
    assert [context.counts["listed"] for context in contexts[:-1]] == [0, 0, 0]

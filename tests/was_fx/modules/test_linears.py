"""The Linears of a model, its weight bytes, and its channels dropped by hooks."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, LlamaConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from was_fx.modules.linears import (
    body_linears,
    bytes_per_token,
    computes_product,
    dense_expert_parameters,
    dense_expert_share,
    expert_parameters,
    find_linears,
    weight_bytes_per_token,
)

TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2),
    "tied llama": LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, **TOKENS),
    "falcon": FalconConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, num_local_experts=4),
}


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_config(config) for name, config in CONFIGS.items()}


LLAMA_BLOCK = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
GPT2_BLOCK = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
EXPERTS = [f"mlp.experts.{each}_proj[{e}]" for each in ("gate_up", "down") for e in range(4)]
FALCON_BLOCK = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]


@pytest.mark.parametrize(
    ("name", "layers", "block"),
    [
        ("llama", "model.layers", LLAMA_BLOCK),
        ("tied llama", "model.layers", LLAMA_BLOCK),
        ("gpt2", "transformer.h", GPT2_BLOCK),
        ("falcon", "transformer.h", FALCON_BLOCK),
        ("mixtral", "model.layers", LLAMA_BLOCK[:4] + EXPERTS),
    ],
)
def test_body_is_every_linear_but_the_head(models, name, layers, block):
    body = [f"{layers}.{i}.{each}" for i in range(2) for each in block]
    assert list(body_linears(models[name])) == body
    found = find_linears(models[name])
    assert list(found) == [*body, "lm_head"]
    assert [each for each, linear in found.items() if linear.head] == ["lm_head"]
    assert all(linear.name == each for each, linear in found.items())


@pytest.mark.parametrize(
    ("name", "linear", "shape", "input_major"),
    [
        ("llama", "model.layers.0.self_attn.k_proj", (32, 64), False),
        ("llama", "model.layers.1.mlp.down_proj", (64, 96), False),
        ("llama", "lm_head", (128, 64), False),
        ("gpt2", "transformer.h.0.attn.c_attn", (192, 64), True),
        ("gpt2", "transformer.h.1.mlp.c_proj", (64, 256), True),
        ("gpt2", "lm_head", (128, 64), False),
    ],
)
def test_shape_is_outputs_by_inputs_whatever_the_module_holds(models, name, linear, shape, input_major):
    found = find_linears(models[name])[linear]
    assert (found.shape, found.input_major) == (shape, input_major)
    assert tuple(found.weight.shape) == shape
    assert found.weight.data_ptr() == found.parameter.data_ptr()
    assert found.parameter is models[name].get_parameter(f"{linear}.weight")


@pytest.mark.parametrize("bias", [True, False])
def test_weight_is_the_one_that_multiplies_the_input(bias):
    modules = nn.ModuleDict({"linear": nn.Linear(5, 3, bias=bias), "conv": Conv1D(3, 5)})
    x = torch.randn(2, 5)
    for name, linear in find_linears(modules).items():
        y = x @ linear.weight.t() + (0 if linear.module.bias is None else linear.module.bias)
        torch.testing.assert_close(y, modules[name](x))


class Integer(nn.Module):
    """Looks like a Linear of a quantised model."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("model", [nn.Embedding(4, 4), nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())])
def test_model_without_linears_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no Linear with a floating-point weight"):
        find_linears(model)


def test_weights_that_are_no_floats_are_named_and_refused():
    with pytest.raises(ValueError, match=r"inner is stored as torch\.int8, and was-fx needs weights in bf16"):
        find_linears(Integer())


def test_model_with_nothing_but_a_head_is_refused():
    class HeadOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def get_output_embeddings(self):
            return self.head

    with pytest.raises(ValueError, match="HeadOnly has no Linear besides its head"):
        body_linears(HeadOnly())


def test_module_registered_twice_is_one_linear():
    shared = nn.Linear(4, 4)
    assert list(find_linears(nn.ModuleDict({"a": shared, "b": shared}))) == ["a"]


def test_linears_that_share_a_weight_are_two():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert list(find_linears(model)) == ["a", "b"]


# Llama: per block q 64·64, k and v 32·64, o 64·64, three of 96·64, two norms of 64.
LLAMA_BODY = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64) + 64
# GPT-2: per block four matrices with biases, two norms with biases.
GPT2_BODY = 2 * (12 * 64 * 64 + (3 + 1 + 4 + 1) * 64 + 4 * 64) + 2 * 64


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("llama", LLAMA_BODY + 128 * 64),  # the head; not the embedding
        ("tied llama", LLAMA_BODY + 128 * 64),  # the head, which is the embedding
        ("gpt2", GPT2_BODY + 128 * 64),  # the tied head; not the positions
    ],
)
def test_weight_bytes_of_a_token(models, name, elements):
    assert weight_bytes_per_token(models[name]) == 4 * elements
    assert weight_bytes_per_token(models[name], find_linears(models[name]).values()) == 4 * elements


def test_of_experts_a_token_reads_those_it_is_sent_to(models):
    experts = expert_parameters(models["mixtral"])
    assert list(experts) == [
        f"model.layers.{i}.mlp.experts.{each}_proj" for i in range(2) for each in ("gate_up", "down")
    ]
    # Two of four experts of 3·96·64; q and o 64·64, k and v 32·64, router 4·64, two norms; the last norm and the head.
    read = 2 * (2 * 3 * 96 * 64)
    others = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 2 * 64) + 64 + 128 * 64
    assert weight_bytes_per_token(models["mixtral"]) == 4 * (read + others)
    linears = find_linears(models["mixtral"]).values()
    assert sum(bytes_per_token(models["mixtral"], each) for each in linears if each.expert is not None) == 4 * read


def test_what_the_registry_does_not_compute_stays_dense(models):
    assert dense_expert_share(models["mixtral"]) == 0
    model = copy.deepcopy(models["mixtral"])
    for layer in model.model.layers:
        del layer.mlp.experts.has_gate
    assert list(dense_expert_parameters(model)) == list(expert_parameters(model))
    read, everything = 2 * (2 * 3 * 96 * 64), weight_bytes_per_token(models["mixtral"]) / 4
    assert dense_expert_share(model) == pytest.approx(read / everything)
    assert weight_bytes_per_token(model) == 4 * everything


def test_an_experts_matrix_is_a_view_of_its_parameter(models):
    linear = find_linears(models["mixtral"])["model.layers.1.mlp.experts.down_proj[2]"]
    held = models["mixtral"].model.layers[1].mlp.experts.down_proj
    assert linear.parameter is held
    assert (linear.shape, linear.nbytes) == ((64, 96), 4 * 64 * 96)
    assert torch.equal(linear.weight, held[2])
    assert linear.matrix.data_ptr() == held[2].data_ptr()


def test_a_model_without_experts_has_none(models):
    assert expert_parameters(models["llama"]) == {}
    assert dense_expert_share(models["llama"]) == 0


def test_weight_bytes_follow_the_dtype():
    model = nn.Sequential(nn.Linear(8, 4, bias=False).bfloat16(), nn.Linear(4, 2, bias=False))
    assert weight_bytes_per_token(model) == 2 * 32 + 4 * 8


def test_a_class_seen_without_weights_first_is_tried_with_weights():
    class Scores(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with torch.device("meta"):
        computes_product(Scores(4, 8))
    assert not computes_product(Scores(4, 8))

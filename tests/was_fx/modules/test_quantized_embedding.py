"""Quantised input embeddings against a look-up in the dequantised weight, tied to the head and not."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import was_fx
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.measure.shapes import config
from was_fx.modules.linears import find_linears, weight_bytes_per_token
from was_fx.modules.quantized_embedding import (
    QuantizedEmbedding,
    embedding_formats,
    make_quantized_embedding,
    settle,
    why_not,
)
from was_fx.modules.quantized_linear import empty_rows, make_quantized
from was_fx.modules.weights import held_bytes

IDS = torch.tensor([[0, 5, 31, 32, 127], [64, 5, 15, 16, 47]])
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 128, "max_position_embeddings": 128, "initializer_range": 0.1}


def model_of(kind=LlamaConfig, tied=False, **changes):
    torch.manual_seed(0)
    config = kind(**SIZES, tie_word_embeddings=tied, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def gemma(tied=True):
    return model_of(Gemma3TextConfig, tied, num_key_value_heads=2, head_dim=16, pad_token_id=0)


BOTH = pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_it_looks_up_rows_of_the_dequantised_weight(group, dtype):
    torch.manual_seed(0)
    module = nn.Embedding(128, 24, padding_idx=3, dtype=dtype)
    rows = quantize_int4("e", module.weight, group) if group else quantize_int8(module.weight)
    expected = rows.dequantize(dtype).t()
    make_quantized_embedding(module, rows)
    assert torch.equal(module(IDS), expected[IDS])
    assert torch.equal(module.weight, expected)
    assert module(IDS[:0]).shape == (0, 5, 24)
    assert torch.equal(module(IDS[0, 0]), expected[0])
    assert group or not module(torch.tensor([3])).any()  # int8 keeps padding at 0
    assert (type(module).__name__, module.padding_idx, module.num_embeddings) == ("QuantizedEmbedding", 3, 128)
    with pytest.raises((IndexError, RuntimeError)):
        module(torch.tensor([128]))


@BOTH
@pytest.mark.parametrize("weights", ["int8", "int4", {"*": "int8", "lm_head": "int4-64"}], ids=str)
def test_logits_are_those_of_the_model_with_the_dequantised_weights(tied, weights):
    model = model_of(tied=tied)
    plain = copy.deepcopy(model)
    was_fx.quantize(model, weights)
    embeddings = model.model.embed_tokens
    assert isinstance(embeddings, QuantizedEmbedding)
    assert embedding_formats(model) == {
        "model.embed_tokens": "tied" if tied else "int4-32" if weights == "int4" else "int8"
    }
    found = model(IDS).logits
    plain.lm_head = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)  # no longer tied
    for name, module in plain.named_modules():
        if hasattr(module, "weight") and "norm" not in name:
            module.weight = nn.Parameter(model.get_submodule(name).weight)
    torch.testing.assert_close(found, plain(IDS).logits, rtol=0.02, atol=0.02)
    if tied:
        assert torch.equal(embeddings.weight, model.lm_head.weight)
        assert not next(embeddings.buffers()).numel()  # nothing but `was_like`


@BOTH
def test_scaled_embeddings_are_scaled_as_before(tied):
    model = gemma(tied)
    embeddings = model.model.embed_tokens
    plain = copy.deepcopy(embeddings)
    was_fx.quantize(model, "int8")
    assert type(embeddings).__name__ == f"Quantized{type(plain).__name__}"
    plain.weight = nn.Parameter(embeddings.weight)
    assert torch.equal(embeddings(IDS), plain(IDS))
    assert not torch.equal(embeddings(IDS), embeddings.weight[IDS])
    model.float(), plain.float()
    plain.weight = nn.Parameter(embeddings.weight)
    assert torch.equal(embeddings(IDS), plain(IDS))
    assert embeddings.was_scale.dtype == torch.float32


class Rotated(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).roll(1, -1)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(128, 16, max_norm=1.0), "max_norm"),
        (nn.Embedding(128, 16, device="meta"), "offloaded or sharded"),
        (Rotated(128, 16), "Rotated does more than to look up and scale"),
        (Shifted(128, 16), "Shifted does more"),
        (nn.Linear(16, 128), "holds no plain weight"),
        (nn.Embedding(128, 16), ""),
    ],
)
def test_what_can_t_be_quantised(module, reason):
    found = why_not(module)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("by_name", [False, True])
def test_embeddings_that_can_t_be_stay_unless_they_are_named(by_name):
    model = model_of()
    model.model.embed_tokens = Shifted(128, 64, dtype=torch.bfloat16)
    if by_name:
        with pytest.raises(ValueError, match=r"model\.embed_tokens can't be quantised: Shifted does more"):
            was_fx.quantize(model, {"*": "int8", "model.embed_tokens": "int8"})
        assert not embedding_formats(model)
    else:
        assert embedding_formats(was_fx.quantize(model, "int8")) == {}


@pytest.mark.parametrize(
    ("tied", "weights", "found"),
    [
        (False, {"*": "int4-64"}, {"model.embed_tokens": "int4-64"}),
        (False, {"*": "int4", "*embed*": "int8"}, {"model.embed_tokens": "int8"}),
        (False, {"*": "int4", "*embed*": "none"}, {}),
        (False, {"*.mlp.*": "int4"}, {}),
        (False, {"lm_head": "int8"}, {}),
        (True, {"*": "int4"}, {"model.embed_tokens": "tied"}),
        (True, {"lm_head": "int4"}, {"model.embed_tokens": "tied"}),
        (True, {"*": "int4", "*embed*": "none"}, {}),
        (True, {"*": "int4", "lm_head": "none"}, {}),
        (True, {"model.*": "int8"}, {}),  # the head stays, so they stay
        (True, {"lm_head": "int8", "model.embed_tokens": "int8"}, {"model.embed_tokens": "tied"}),
    ],
)
def test_formats_by_pattern(tied, weights, found):
    model = was_fx.quantize(model_of(tied=tied), weights)
    assert embedding_formats(model) == found
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"*": "int8", "model.embed_tokens": "int4"}, "shares its weight with lm_head, which is to be int8"),
        ({"model.embed_tokens": "int8"}, "shares its weight with lm_head, which is to be none"),
    ],
)
def test_tied_embeddings_have_no_format_of_their_own(weights, words):
    model = model_of(tied=True)
    with pytest.raises(ValueError, match=words):
        was_fx.quantize(model, weights)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_format_of_quantised_embeddings_is_refused():
    model = was_fx.quantize(model_of(), "int8")
    was_fx.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"model\.embed_tokens is int8 already, and can't become int4-32"):
        was_fx.quantize(model, {"model.embed_tokens": "int4"})


@pytest.mark.parametrize("make", [model_of, lambda tied: gemma(tied)], ids=["llama", "scaled"])
@BOTH
def test_it_is_saved_and_loaded_bit_by_bit_and_small(make, tied, tmp_path):
    model = was_fx.quantize(make(tied=tied), "int4")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert embedding_formats(again) == embedding_formats(model)
    assert (tmp_path / "model.safetensors").stat().st_size < held_bytes(model) + 20_000
    assert held_bytes(again) == held_bytes(model)


def test_a_checkpoint_without_its_codes_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    was_fx.quantize(model_of(), "int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.codes"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no model\.embed_tokens\.codes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@BOTH
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch],
    ids=["copy", "pickle", "torch.save"],
)
def test_copies_hold_embeddings_of_their_own(through, tied):
    model = was_fx.quantize(model_of(tied=tied), "int8")
    again = through(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    if tied:
        assert again.model.embed_tokens.was_head[0] is again.lm_head
    source = again.lm_head if tied else again.model.embed_tokens
    source.codes.zero_()
    assert not again.model.embed_tokens(IDS).any()
    assert model.model.embed_tokens(IDS).any()


@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(tied, backend):
    model = was_fx.quantize(gemma(tied), "int8")
    expected = model(IDS).logits
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=0.02, atol=0.02)


@BOTH
def test_a_sparse_model_generates_with_it(tied):
    model = was_fx.quantize(model_of(tied=tied), "int8")
    tokens = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(2))
    was_fx.sparsify(model, was_fx.uniform(was_fx.calibrate(model, tokens), 0.5))
    text = model.generate(IDS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert text.shape == (1, 11)
    assert not any(row.dense for row in was_fx.check(model).linears)
    was_fx.densify(model)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)


@BOTH
def test_another_vocabulary_is_refused(tied):
    model = was_fx.quantize(model_of(tied=tied), "int8")
    assert model.resize_token_embeddings() is model.model.embed_tokens
    assert model.resize_token_embeddings(128) is model.model.embed_tokens
    for arguments in ((130,), (None, 64)):
        with pytest.raises(ValueError, match="resize the unquantised model, then quantise it"):
            copy.deepcopy(model).resize_token_embeddings(*arguments)


def test_a_model_without_other_parameters_keeps_its_embeddings():
    """transformers tells dtype and device of a model by its parameters."""
    from transformers import OlmoConfig

    model = was_fx.quantize(model_of(OlmoConfig, pad_token_id=None, eos_token_id=None), "int8")
    assert not embedding_formats(model)
    assert model.device == torch.device("cpu")
    assert model(IDS).logits.isfinite().all()


def test_a_vocabulary_that_groups_don_t_divide_is_int8_unless_its_name_was_given():
    model = model_of()
    model.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(ValueError, match="has 120 outputs, which groups of 32 don't divide"):
        was_fx.quantize(copy.deepcopy(model), {"*": "int4", "*embed*": "int4"})
    assert embedding_formats(was_fx.quantize(model, {"*": "int4"})) == {"model.embed_tokens": "int8"}
    assert model(IDS % 120).logits.shape == (2, 5, 120)


def test_settling_finds_the_scale_of_what_was_made_on_the_meta_device():
    embeddings = gemma().model.embed_tokens
    scale = embeddings.embed_scale.clone()
    rows = quantize_int8(embeddings.weight)
    embeddings.to("meta")
    make_quantized_embedding(embeddings, rows)
    embeddings.embed_scale = scale
    settle(embeddings)
    assert embeddings.was_scale == scale


@BOTH
def test_only_the_head_counts_as_read_for_a_token(tied):
    model = was_fx.quantize(model_of(tied=tied), "int8")
    norms = sum(each.numel() * each.element_size() for each in model.parameters())
    linears = sum(
        m.was_rows.nbytes for m in model.modules() if hasattr(m, "was_rows") and not isinstance(m, nn.Embedding)
    )
    assert weight_bytes_per_token(model) == norms + linears


@pytest.mark.parametrize(
    ("body", "head", "embeddings", "expected"),
    [
        ("int8", "int8", "int8", 0.5002),
        ("int4-32", "int8", "int4-32", 0.2959),  # what "int4" gives
        ("int4-32", "int8", "int8", 0.3103),
        ("int4-32", "int4-32", "int8", 0.2962),
        ("int4-64", "int8", "int8", 0.2962),
        ("int4-32", "int4-32", "int4-32", 0.2816),
    ],
)
def test_memory_of_llama_3_8b_on_the_meta_device(body, head, embeddings, expected):
    """By the buffers that a checkpoint in these formats is loaded into, against bf16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("llama-3-8b"), dtype=torch.bfloat16)
    before = held_bytes(model)
    for name, linear in find_linears(model).items():
        rows = empty_rows(name, linear.module, head if linear.head else body)
        make_quantized(linear.module, rows, torch.bfloat16)
    module = model.model.embed_tokens
    make_quantized_embedding(module, empty_rows("model.embed_tokens", module, embeddings))
    ratio = held_bytes(model) / before
    sys.stdout.write(
        f"\n{body}, head {head}, embeddings {embeddings}: {held_bytes(model):,} bytes, {ratio:.4f} of bf16\n"
    )
    assert ratio == pytest.approx(expected, abs=5e-4)

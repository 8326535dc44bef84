"""Classes of transformers that must be covered completely. tests/passes/test_architectures.py has more of them."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from was_fx.coverage import cover as coverage
from was_fx.coverage.cover import TOLERANCE, Coverage, candidates, cover
from was_fx.coverage.full_size import full_size

PAGE = Path(__file__).parents[3] / "docs" / "coverage.md"

WHOLE = {"linears": 15, "sparse": 14, "decode_steps": 5, "exact": 1e-7, "oracle": 1e-7, "compiled": 1e-7, "effect": 0.5}

# With those of test_architectures.py: every family that was-fx promises, and a sample of the others.
PROMISED = [
    "gemma",
    "gemma3_text",
    "gptj",
    "mpt",
    "starcoder2",
    "granite",
    "smollm3",
    "glm4",
    "qwen3_moe",
    "deepseek_v3",
]
SAMPLE = ["codegen", "recurrent_gemma"]
MULTIMODAL = ["gemma3", "qwen3_vl", "llava"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", PROMISED + SAMPLE)
def test_every_linear_is_sparse_and_equal_to_both_references(model_type):
    found = cover(model_type)
    assert found.complete, found
    assert found.sparse == found.linears - 1  # the head
    assert found.compiled is not None
    assert found.decode_graphs >= 1
    if model_type in PROMISED:
        assert (found.prompt_graphs, found.graph_breaks) == (1, ())


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_every_linear_of_a_text_decoder_is_sparse(model_type):
    found = cover(model_type, graphs=False)
    assert found.complete, found
    assert found.multimodal
    assert found.sparse == found.linears - 1
    assert {"image", "static cache"} <= set(found.variants)


def test_rotary_embeddings_are_tried():
    assert {"linear RoPE", "dynamic RoPE", "yarn RoPE", "longrope RoPE", "llama3 RoPE"} <= set(
        cover("llama", graphs=False).variants
    )


def test_the_share_of_bytes_is_that_of_a_model_of_full_size():
    """Llama 2 7B: all but the head, 32000 · 4096 of 6.74 · 10⁹ weights, and norms."""
    found = full_size("llama")
    assert found["share"] == pytest.approx(6.476e9 / 6.607e9, abs=1e-3)
    assert found["billions"] == pytest.approx(6.738, abs=1e-3)
    assert full_size("llama", ["model.layers.0.mlp.up_proj"])["share"] < found["share"] - 0.2
    assert full_size("mixtral")["share"] > 0.98  # of the two experts that a token is sent to
    assert full_size("nothing") == {}


def types_of_the_page(text: str | None = None) -> dict[str, bool]:
    text = PAGE.read_text(encoding="utf-8") if text is None else text
    rows = re.findall(r"^\| ([\w.-]+) \| (yes|no) \|", text, re.MULTILINE)
    return {name: complete == "yes" for name, complete in rows}


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", [name for name, reason in candidates().items() if reason is None])
def test_the_page_says_what_is_complete(model_type):
    found = cover(model_type)
    assert found.complete == types_of_the_page().get(model_type, True), found


def test_how_many_classes_are_complete():
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," in text:
        assert set(types_of_the_page()) <= {name for name, reason in candidates().items() if reason is None}
    decoders, multimodal = map(types_of_the_page, text.split("## Multimodal models"))
    assert sum(decoders.values()) >= 0.97 * len(decoders)
    assert sum(multimodal.values()) >= 0.75 * len(multimodal)


def test_what_is_no_decoder_is_left_out_with_a_reason():
    left_out = candidates()
    assert all(left_out[name] for name in ("bert", "bart", "whisper", "florence2", "pi0"))
    assert left_out["gpt-sw3"] == "the same class as gpt2"


def test_an_unknown_type_is_an_error_in_the_result():
    found = cover("nothing")
    assert not found.complete
    assert "nothing" in found.error


@pytest.mark.parametrize(
    "change",
    [
        {"exact": 2 * TOLERANCE},
        {"oracle": None},
        {"oracle": float("inf")},
        {"effect": TOLERANCE},  # a comparison that moves nothing proves nothing
        {"declined": {"model.layers.0.mlp.up_proj": "its module is never called"}},
        {"compiled": 2 * TOLERANCE},
        {"variants": {"static cache": 2 * TOLERANCE}},
        {"sparse": 0},
        {"decode_steps": 0},
        {"error": "ValueError: no"},
    ],
)
def test_incomplete(change):
    assert Coverage("llama", "LlamaForCausalLM", **WHOLE).complete
    assert not Coverage("llama", "LlamaForCausalLM", **{**WHOLE, **change}).complete


def test_a_graph_break_is_no_reason_to_be_incomplete():
    assert Coverage("llama", "LlamaForCausalLM", **WHOLE, graph_breaks=("data-dependent branch",)).complete


def test_a_wrong_threshold_is_found(monkeypatch):
    sparsify = coverage.sparsify

    def wrong(model, *arguments, **keywords):
        sparsify(model, *arguments, **keywords)
        model.model.layers[1].mlp.up_proj.was_threshold.mul_(1.5)

    monkeypatch.setattr(coverage, "sparsify", wrong)
    found = cover("llama")
    assert found.oracle > TOLERANCE
    assert not found.complete


def change_model(monkeypatch, change):
    """Let `cover` see what `change` makes of a small model."""
    build = coverage.tiny_model
    monkeypatch.setattr(coverage, "tiny_model", lambda model_type: change(build(model_type)))


class Reads(nn.Module):
    """Uses a Linear and its weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x @ (self.inner.weight * 2).t() + self.inner(x)


def test_linears_that_run_dense_are_named_and_the_others_compared(monkeypatch):
    def strange(model):
        model.model.layers[0].mlp.up_proj = Reads(model.model.layers[0].mlp.up_proj)
        module = model.model.layers[1].mlp.gate_proj
        module.forward = lambda x: x @ (module.weight + 0).t()
        return model

    change_model(monkeypatch, strange)
    found = cover("llama")
    assert found.declined == {"model.layers.1.mlp.gate_proj": "it is called, and no sparse product is made"}
    assert found.sparse == 13
    assert found.oracle <= TOLERANCE
    assert not found.complete


class Holds(nn.Module):
    """Has a Linear that it doesn't call."""

    def __init__(self, inner, product):
        super().__init__()
        self.inner = inner
        self.product = product

    def forward(self, x):
        return self.product(x, self.inner)


@pytest.mark.parametrize(
    ("product", "by_model"),
    [
        (lambda x, inner: nn.functional.linear(x, inner.weight), True),
        (lambda x, inner: x.to(inner.weight.dtype) @ torch.ones(inner.in_features, inner.out_features), False),
    ],
    ids=["read", "not read"],
)
def test_a_linear_whose_module_is_never_called_is_named(monkeypatch, product, by_model):
    def strange(model):
        model.model.layers[0].mlp.up_proj = Holds(model.model.layers[0].mlp.up_proj, product)
        return model

    change_model(monkeypatch, strange)
    found = cover("llama")
    name = "model.layers.0.mlp.up_proj.inner"
    assert found.by_model == ((name,) if by_model else ())
    assert found.declined == ({} if by_model else {name: "its module is never called"})
    assert found.oracle <= TOLERANCE
    assert found.sparse == 13


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "longcat_flash"])
def test_a_weight_that_the_model_multiplies_by_itself_stays_dense_and_is_counted(model_type):
    found = cover(model_type, graphs=False)
    assert found.complete, found
    assert found.by_model
    assert found.sparse == found.linears - 1 - len(found.by_model)
    assert 0.001 < found.by_model_share < 0.02
    others = full_size(model_type)
    assert others["share"] == pytest.approx(found.share + found.by_model_share)
    assert others["by_model_share"] == 0


def test_what_breaks_graphs_is_told_and_right_all_the_same(monkeypatch):
    def breaking(model):
        model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        return model

    change_model(monkeypatch, breaking)
    found = cover("llama")
    assert found.complete
    assert found.graph_breaks
    assert found.prompt_graphs > 1


def test_a_model_without_a_cache_is_incomplete():
    """Each of its steps is a prompt again, and dense by default."""
    found = cover("openai-gpt")
    assert found.oracle <= TOLERANCE
    assert (found.decode_steps, found.declined) == (0, {})
    assert not found.complete

"""Classes of transformers that must be covered completely. tests/passes/test_architectures.py has more of them."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from was_fx.coverage.cover import TOLERANCE, Coverage, candidates, cover

PAGE = Path(__file__).parents[3] / "docs" / "coverage.md"

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


@pytest.mark.parametrize("model_type", PROMISED + SAMPLE)
def test_every_linear_is_rewritten_in_whole_graphs_and_equal_to_both_references(model_type):
    found = cover(model_type)
    assert found.complete, found
    assert found.rewritten == found.linears - 1  # the head


def types_of_the_page() -> dict[str, bool]:
    rows = re.findall(r"^\| ([\w.-]+) \| (yes|no) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: complete == "yes" for name, complete in rows}


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", [name for name, reason in candidates().items() if reason is None])
def test_the_page_says_what_is_complete(model_type):
    found = cover(model_type)
    assert found.complete == types_of_the_page().get(model_type, True), found


def test_at_least_nine_in_ten_classes_are_complete():
    page = types_of_the_page()
    if f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8"):
        assert set(page) == {name for name, reason in candidates().items() if reason is None}
    assert sum(page.values()) >= 0.9 * len(page)


def test_what_is_no_decoder_is_left_out_with_a_reason():
    left_out = candidates()
    assert all(left_out[name] for name in ("bert", "bart", "whisper", "gemma3", "fuyu"))
    assert left_out["internlm3"] == "the same class as llama"


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
        {"graph_breaks": ("data-dependent branch",)},
        {"decode_graphs": 0},
        {"error": "ValueError: no"},
    ],
)
def test_incomplete(change):
    whole = {"linears": 15, "rewritten": 14, "exact": 1e-7, "oracle": 1e-7, "effect": 0.5}
    whole |= {"prompt_graphs": 1, "decode_graphs": 1}
    assert Coverage("llama", "LlamaForCausalLM", **whole).complete
    assert not Coverage("llama", "LlamaForCausalLM", **{**whole, **change}).complete


def test_a_wrong_threshold_is_found(monkeypatch):
    from was_fx.coverage import cover as coverage

    sparsify = coverage.sparsify

    def wrong(model, *arguments, **keywords):
        sparsify(model, *arguments, **keywords)
        next(iter(model.model.layers[1].mlp.up_proj.weight._was.bindings.values())).threshold.mul_(1.5)

    monkeypatch.setattr(coverage, "sparsify", wrong)
    found = cover("llama")
    assert found.oracle > TOLERANCE
    assert not found.complete


def test_linears_that_cannot_be_rewritten_are_left_dense_and_named(monkeypatch):
    from was_fx.coverage import cover as coverage

    class Reads(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x @ (self.inner.weight * 2).t() + self.inner(x)

    build = coverage.tiny_model

    def strange(model_type):
        model = build(model_type)
        model.model.layers[0].mlp.up_proj = Reads(model.model.layers[0].mlp.up_proj)
        head = model.model.layers[1].mlp
        head.gate_proj.forward = lambda x: x @ (head.gate_proj.weight + 0).t()
        return model

    monkeypatch.setattr(coverage, "tiny_model", strange)
    found = cover("llama")
    assert list(found.declined) == ["model.layers.1.mlp.gate_proj"]
    assert found.oracle <= TOLERANCE
    assert not found.complete

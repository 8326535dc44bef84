"""`was coverage` and its page."""

import json

import pytest

from was_fx.cli.render import coverage_page
from was_fx.coverage import sweep as coverage_sweep
from was_fx.coverage.cover import Coverage

WHOLE = {"linears": 15, "sparse": 14, "decode_steps": 5, "exact": 1e-7, "oracle": 2e-7, "effect": 0.5}
WHOLE |= {"prompt_graphs": 1, "decode_graphs": 1}
REASON = "its module is never called"
ROWS = {
    "llama": Coverage("llama", "LlamaForCausalLM", **WHOLE, share=0.98, billions=6.74, variants={"a": 1e-7, "b": 3e-7}),
    "mixtral": Coverage(
        "mixtral", "M", **WHOLE, experts=("layers.0.experts.up", "layers.1.experts.up"), experts_dense=0.69
    ),
    "mamba": Coverage("mamba", "M", **{**WHOLE, "declined": {f"layers.{i}.dt_proj": REASON for i in range(2)}}),
    "ctrl": Coverage("ctrl", "C", **{**WHOLE, "decode_graphs": 0}, graph_breaks=("a | b",)),
    "gpt2": Coverage("gpt2", "G", error="ValueError: no"),
    "jamba": Coverage("jamba", "J", **WHOLE, by_model=("layers.0.dt_proj", "layers.1.dt_proj"), by_model_share=0.005),
    "xlstm": Coverage("xlstm", "X", **WHOLE, by_model=("layers.0.gate",)),
    "bloom": Coverage("bloom", "B", **{**WHOLE, "decode_steps": 0}),
    "llava": Coverage("llava", "L", **WHOLE, multimodal=True),
}


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(coverage_sweep, "_isolated", lambda name, timeout, graphs: ROWS[name])


def test_types_by_name(was):
    result = was("coverage", "llama", "mixtral")
    assert result.code == 0
    assert "2 of 2 complete" in result.stdout
    assert "layers.*.experts.up stay dense: 69.0 %" in " ".join(result.stdout.split())


def test_an_incomplete_type_is_code_1(was):
    assert was("coverage", "llama", "mamba").code == 1


def test_an_unknown_type_is_refused_with_the_nearest(was):
    result = was("coverage", "lama")
    assert result.code == 2
    assert "llama" in result.stderr


def test_json(was):
    found = json.loads(was("coverage", "llama", "gpt2", "--json").stdout)
    assert found["complete"] == 1
    assert [entry["complete"] for entry in found["types"]] == [True, False]
    assert found["versions"]["was-fx"]


def test_markdown_is_written_and_not_replaced_unasked(was, tmp_path):
    page = tmp_path / "coverage.md"
    was("coverage", *ROWS, "--markdown", str(page))
    text = page.read_text(encoding="utf-8")
    assert "5 of 8 (62 %) decoder-only causal LM classes of transformers are complete, and 1 of 1 (100 %)" in text
    assert "In 2 of these some weights stay dense beside the head" in text
    assert "in 1 they are more than 10 % of the bytes" in text
    assert "| llama | yes | 15 | 14 | 0 | 98 % | 6.7 B | 1 | 1 | 0 | 1e-07 | 2e-07 | 2, 3e-07 |  |" in text
    assert text.index("| bloom |") < text.index("## Multimodal models") < text.index("| llava |")
    assert was("coverage", "llama", "--markdown", str(page)).code == 1
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("model_type", "note"),
    [
        ("llama", ""),
        ("mixtral", "layers.*.experts.up stay dense: 69.0 % of the bytes"),
        ("mamba", f"layers.*.dt_proj: {REASON}"),
        ("jamba", "layers.*.dt_proj stay dense, read by the model itself: 0.5 % of the bytes"),
        ("xlstm", "layers.*.gate stay dense, read by the model itself"),
        ("ctrl", "graph break: a | b"),
        ("gpt2", "ValueError: no"),
        ("bloom", "each step is a prompt: no cache, or all tokens are given again"),
    ],
)
def test_notes_say_what_the_numbers_do_not(model_type, note):
    assert coverage_page.notes(ROWS[model_type]) == note


def test_a_page_without_graphs_says_so():
    text = coverage_page.page([ROWS["llama"]], {}, {}, graphs=False)
    assert "Made by `was coverage --no-graphs --markdown" in text
    assert "Graphs were not looked at for this page." in text


def test_the_page_lists_what_is_left_out_by_reason():
    left_out = {"bert": "an encoder", "roberta": "an encoder", "internlm3": "the same class as llama"}
    text = coverage_page.page([ROWS["ctrl"]], left_out, {"torch": "2.13"})
    assert "| an encoder | bert, roberta |" in text
    assert "| the same class as another type | internlm3 (llama) |" in text
    assert "a \\| b" in text
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []

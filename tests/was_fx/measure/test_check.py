"""The report of `check`; tests/cases says what it must find."""

import logging
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

import was_fx
from was_fx.kernels.cpu.library import KINDS, kind
from was_fx.kernels.linear import cpu_gather, dense_linear
from was_fx.measure import check
from was_fx.modules.sparse_linear import sparse_linears


@pytest.fixture
def sparse(llama, calibration):
    return was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5))


def test_every_linear_with_its_kernel_and_the_reason(sparse, tokens):
    report = was_fx.check(sparse, tokens[:1, :9], new_tokens=5)
    kernel = "cpu_gather" if cpu_gather.library() else "cpu_embedding_bag"
    assert {row.implementation for row in report.linears} == {kernel}
    assert kernel != "cpu_gather" or {row.reason.split("; ")[1] for row in report.linears} == {
        f"{KINDS[min(kind(), 2)]} kernels"
    }
    assert all(row.reason and row.tokens == 4 for row in report.linears)
    assert (report.path, report.device, report.steps, report.notes) == ("eager", "cpu", 4, ())


@pytest.mark.parametrize("how", [{"sequences": 3}, {"prompt": torch.arange(2, 29).view(3, 9)}])
def test_several_sequences_decode_together(sparse, how):
    report = was_fx.check(sparse, new_tokens=5, **how)
    assert report.ok
    assert {row.tokens for row in report.linears} == {12}
    assert report.steps == 4
    assert 0.3 < report.realised < 0.7


def test_steps_that_read_every_row_are_noted(sparse, monkeypatch):
    rows = check._rows
    masked = lambda *given: tuple(replace(row, implementation="masked_gemm") for row in rows(*given))  # noqa: E731
    monkeypatch.setattr(check, "_rows", masked)
    (note,) = was_fx.check(sparse, sequences=2).notes
    assert note.startswith("steps of 2 sequences read every row of 14 Linears, once")


def test_the_numbers_of_the_whole_are_those_of_its_linears(sparse):
    report = was_fx.check(sparse, new_tokens=9)
    sizes = {name: module.weight.numel() for name, module in sparse_linears(sparse).items()}
    saved = sum(row.realised * sizes[row.name] for row in report.linears)
    assert report.realised == pytest.approx(saved / sum(sizes.values()))
    read = sum(p.numel() for name, p in sparse.named_parameters() if "embed_tokens" not in name)
    assert report.bytes_saved == pytest.approx(saved / read)


@pytest.mark.parametrize("prefill", ["sparse", "half", "all"])
def test_the_prompt_is_dense_whatever_prompts_are(llama, calibration, prefill):
    model = was_fx.sparsify(llama, was_fx.uniform(calibration, 0.5), prefill=prefill)
    report = was_fx.check(model, new_tokens=4)
    assert {row.tokens for row in report.linears} == {3}
    assert model._was_state.rule.prefill == prefill


def test_without_a_compiler_it_says_so(sparse, monkeypatch):
    for module in (cpu_gather, dense_linear):
        monkeypatch.setattr(module, "library", lambda: None)
    report = was_fx.check(sparse)
    assert {row.implementation for row in report.linears} == {"cpu_embedding_bag"}
    assert {row.reason for row in report.linears} == {"no C++ compiler was found"}


def test_what_no_kernel_serves_is_right_and_noted(sparse):
    report = was_fx.check(sparse.double())
    assert report.ok
    assert {row.implementation for row in report.linears} == {"dense_product"}
    assert report.notes == ("14 Linears are right but not faster: no kernel skips their rows here",)


def test_compiled_siblings_are_told_one_by_one(sparse):
    sparse.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    report = was_fx.check(sparse)
    assert report.ok
    assert report.path == "compiled"
    assert all(row.implementation for row in report.linears)


def test_a_dense_one_is_named_with_a_reason(sparse):
    module = sparse.model.layers[0].mlp.up_proj
    module.forward = types.MethodType(nn.Linear.forward, module)
    report = was_fx.check(sparse)
    (row,) = [row for row in report.linears if row.dense]
    assert (row.name, row.tokens, row.realised, row.implementation) == ("model.layers.0.mlp.up_proj", 0, 0.0, "")
    assert row.reason == "no sparse product was made"
    assert not report.ok


def test_warnings_meanwhile_become_notes_and_no_handler_stays(sparse, monkeypatch):
    handlers = list(logging.getLogger("was_fx").handlers)
    generate = type(sparse).generate

    def warns(self, *arguments, **keywords):
        for _ in range(2):
            logging.getLogger("was_fx.anything").warning("the cache is %s", "large")
        return generate(self, *arguments, **keywords)

    monkeypatch.setattr(type(sparse), "generate", warns)
    assert was_fx.check(sparse).notes == ("the cache is large",)
    assert logging.getLogger("was_fx").handlers == handlers


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"new_tokens": 1}, ValueError, "new_tokens is 1; expected at least 2"),
        ({"sequences": 0}, ValueError, "sequences is 0; expected at least 1"),
        ({"prompt": torch.full((1, 4), 500)}, ValueError, "vocabulary is 0 to 127"),
        ({"prompt": torch.zeros(1, 4)}, TypeError, "float32"),
    ],
)
def test_refusals(sparse, arguments, error, message):
    with pytest.raises(error, match=message):
        was_fx.check(sparse, **arguments)


def test_a_model_that_can_not_generate_is_refused(sparse):
    body = nn.Module()
    body._was_state = sparse._was_state
    with pytest.raises(ValueError, match=r"Module has no generate\(\)"):
        was_fx.check(body)

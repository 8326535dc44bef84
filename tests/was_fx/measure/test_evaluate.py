"""evaluate and perplexity: loss, realised sparsity, bytes."""

import math

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.compat.dynamo import graphs_compiled
from was_fx.modules.linears import find_linears


def plain_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_dense_loss_is_the_mean_cross_entropy(llama, tokens, batch_size):
    evaluation = was_fx.evaluate(llama, tokens, batch_size=batch_size)
    assert evaluation.loss == pytest.approx(plain_loss(llama, tokens), abs=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))
    assert evaluation.tokens == 4 * 63
    assert (evaluation.nominal, evaluation.realised, evaluation.bytes_saved) == (0.0, 0.0, 0.0)


def test_sparse_loss_is_the_oracles(llama, calibration, oracle, tokens):
    schedule = was_fx.uniform(calibration, target=0.6)
    expected = plain_loss(oracle(llama, schedule), tokens)
    was_fx.sparsify(llama, schedule)
    assert was_fx.perplexity(llama, tokens, prefill="all") == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize(("prefill", "dense"), [("sparse", 1), ("half", 32), ("all", 0)])
def test_realised_sparsity_counts_what_the_sparse_tokens_dropped(llama, calibration, tokens, prefill, dense):
    schedule = was_fx.uniform(calibration, target=0.5)
    name = "model.layers.0.self_attn.q_proj"  # its input is the same in the dense model
    inputs = []
    handle = llama.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    plain_loss(llama, tokens)
    handle.remove()
    norms = llama.get_submodule(name).weight.abs().sum(0)
    dropped = inputs[0][:, dense:].abs() * norms <= schedule.linears[name].threshold
    was_fx.sparsify(llama, schedule)
    evaluation = was_fx.evaluate(llama, tokens, prefill=prefill)
    assert evaluation.linears[name] == pytest.approx(dropped.float().mean().item(), abs=1e-3)


def test_model_sparsity_and_bytes_are_weighted_by_true_sizes(llama, calibration, tokens):
    was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    evaluation = was_fx.evaluate(llama, tokens)
    linears = find_linears(llama)
    sizes = {name: linears[name].parameter.numel() for name in evaluation.linears}
    saved = sum(evaluation.linears[name] * size for name, size in sizes.items())
    every = sum(p.numel() for n, p in llama.named_parameters() if "embed_tokens" not in n)
    assert evaluation.nominal == pytest.approx(0.5)
    assert evaluation.realised == pytest.approx(saved / sum(sizes.values()))
    assert evaluation.bytes_saved == pytest.approx(saved / every)


def test_a_second_evaluation_starts_counting_anew_and_compiles_nothing(llama, calibration, tokens):
    was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    llama.compile(backend="was", dynamic=True, options={"lowering": "eager"})
    first = was_fx.evaluate(llama, tokens)
    graphs = graphs_compiled()
    assert was_fx.evaluate(llama, tokens) == first
    graphs = graphs_compiled()  # the first call after a change of the counters traces anew
    assert was_fx.evaluate(llama, tokens) == first
    was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.25))
    assert was_fx.evaluate(llama, tokens).realised == pytest.approx(0.25, abs=0.02)
    assert graphs_compiled() == graphs


def test_progress_is_told(llama, tokens):
    told = []
    was_fx.evaluate(llama, tokens, batch_size=3, progress=lambda done, of: told.append((done, of)))
    assert told == [(3, 4), (4, 4)]


@pytest.fixture(scope="module")
def calibrated(_embedded_model):
    return was_fx.calibrate(_embedded_model, embedded.tokens("calibration", length=256)[:64], batch_size=8)


@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_realised_sparsity_on_unseen_text_is_near_nominal(embedded_model, calibrated, level):
    """The promise: within 1.5 points, on the test text, after `recalibrate`."""
    tokens = embedded.tokens("calibration", length=256)
    schedule = was_fx.uniform(calibrated, target=level)
    schedule = was_fx.recalibrate(embedded_model, schedule, tokens[64:96], batch_size=8)
    was_fx.sparsify(embedded_model, schedule)
    unseen = embedded.tokens("test", length=256, limit=32)
    assert was_fx.evaluate(embedded_model, unseen, batch_size=8).realised == pytest.approx(level, abs=0.015)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(2, 8), TypeError, "float32"),
        ([[1, 2]], TypeError, "list"),
        (torch.zeros(8, dtype=torch.long), ValueError, "shape"),
        (torch.zeros(2, 1, dtype=torch.long), ValueError, "shape"),
        (torch.full((1, 8), 128), ValueError, "vocabulary is 0 to 127"),
        (torch.full((1, 8), -1), ValueError, "ids -1"),
    ],
)
def test_bad_tokens_are_refused(llama, bad, error, message):
    with pytest.raises(error, match=message):
        was_fx.evaluate(llama, bad)


def test_a_dense_prompt_is_refused_for_a_sparsified_model(llama, calibration, tokens):
    was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    with pytest.raises(ValueError, match="measure the dense model"):
        was_fx.evaluate(llama, tokens, prefill="dense")

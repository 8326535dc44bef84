"""calibrate and recalibrate: the right quantiles, in bounded memory, leaving the model as it was."""

import os
import subprocess
import sys

import pytest
import torch

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.modules.linears import byte_share, find_linears


def inputs_of(model: torch.nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """[tokens, K]: what the Linear `name` sees."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("score", [was_fx.Score(0.0, 1), was_fx.Score(1.0, 1), was_fx.Score(0.5, 2)], ids=str)
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_thresholds_are_the_quantiles_of_the_score(llama, tokens, score, name):
    calibration = was_fx.calibrate(llama, tokens, score=score, batch_size=3)
    norms = llama.get_submodule(name).weight.norm(p=score.norm, dim=0)
    scores = inputs_of(llama, name, tokens).abs() * norms**score.exponent
    for level in (0.25, 0.5, 0.9):
        share = (scores <= calibration.threshold(name, level)).float().mean().item()
        assert share == pytest.approx(level, abs=0.003)


def test_every_linear_but_the_head_is_calibrated(llama, calibration, tokens):
    expected = {n for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert set(calibration.shapes) == expected
    assert calibration.tokens == tokens.numel()


def test_the_model_is_left_as_it_was(llama, tokens):
    llama.train()
    was_fx.calibrate(llama, tokens)
    assert llama.training
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_hooks_go_when_the_run_fails(llama, tokens):
    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        was_fx.calibrate(llama, tokens, progress=stop)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_a_sparsified_model_is_refused(llama, calibration, tokens):
    was_fx.sparsify(llama, was_fx.uniform(calibration, target=0.5))
    with pytest.raises(ValueError, match="densify"):
        was_fx.calibrate(llama, tokens)


def test_nan_activations_are_refused_by_name(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(was_fx.ScheduleError, match=r"model\.layers\.1\.mlp\.down_proj"):
        was_fx.calibrate(llama, tokens)


def test_a_linear_that_the_model_reads_without_a_call_is_left_out(caplog):
    model = tiny_model("mamba")
    text = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(1))
    calibration = was_fx.calibrate(model, text)
    assert calibration.excluded == tuple(f"backbone.layers.{i}.mixer.dt_proj" for i in range(2))
    share = 100 * byte_share(model, [find_linears(model)[name] for name in calibration.excluded])
    assert "2 of 8 Linears are left out and stay dense" in caplog.text
    assert f"they are {share:.1f} % of the bytes of a token" in caplog.text
    assert "no token reaches them" not in caplog.text
    weight = model.backbone.layers[0].mixer.dt_proj.weight
    before = weight.stride()
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    assert model.backbone.layers[0].mixer.dt_proj.weight is weight
    assert weight.stride() == before
    assert was_fx.check(model).ok


def test_recalibration_takes_thresholds_from_the_model_whose_first_tokens_are_dense(llama, calibration, tokens):
    before = was_fx.uniform(calibration, target=0.6)
    after = was_fx.recalibrate(llama, before, tokens, rounds=1, batch_size=2)
    name = "model.layers.1.mlp.down_proj"  # downstream of everything dropped
    norms = llama.get_submodule(name).weight.abs().sum(0)
    was_fx.sparsify(llama, before, prefill="sparse")
    inputs = inputs_of(llama, name, tokens).unflatten(0, tokens.shape)
    was_fx.densify(llama)
    scores = inputs[:, 1:].abs() * norms  # the first of 64 tokens is dense
    assert (scores <= after.linears[name].threshold).float().mean().item() == pytest.approx(0.6, abs=0.003)
    assert {n: e.sparsity for n, e in after.linears.items()} == {n: e.sparsity for n, e in before.linears.items()}


def test_recalibration_keeps_channel_thresholds(llama, calibration, tokens):
    schedule = was_fx.uniform(calibration, target=0.6)
    name = next(iter(schedule.linears))
    own = was_fx.LinearSchedule(0.5, 0.0, 1.0, channel_threshold=torch.ones(schedule.shapes[name][1]))
    schedule = schedule.replace({name: own})
    assert was_fx.recalibrate(llama, schedule, tokens).linears[name] == own


MEMORY = """
import re, sys, torch, was_fx
from transformers import LlamaConfig, LlamaForCausalLM

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

def build(hidden, blocks):
    config = LlamaConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks,
                         num_attention_heads=16, num_key_value_heads=8, vocab_size=256, max_position_embeddings=128)
    return LlamaForCausalLM(config).eval()

def sparsify_and_run(model, schedule):
    was_fx.sparsify(model, schedule)
    model.generate(tokens[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)  # lays siblings together

tokens = torch.randint(0, 256, (2, 64))
small = build(64, 1)  # what importing and tracing cost is not the weights'
sparsify_and_run(small, was_fx.uniform(was_fx.calibrate(small, tokens), target=0.5))
model = build(1024, 8)
schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target=0.5)
size = sum(p.numel() * p.element_size() for p in model.parameters())
block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
if sys.argv[1] == "sparsify":
    sparsify_and_run(model, schedule)
else:
    was_fx.calibrate(model, tokens.repeat(int(sys.argv[2]), 1))
print((status("VmHWM") - before) / size, block / size, status("VmHWM") - before)
"""


def measure_memory(*arguments: str) -> tuple[float, float, float]:
    """(growth of the peak, size of a block) as shares of the model, and the growth in bytes."""
    # Freed memory must go back to the system at once, or the peak holds what malloc keeps for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEMORY, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, block, size = map(float, run.stdout.split())
    return growth, block, size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sparsify_and_compilation_make_no_second_copy_of_the_weights():
    growth, block, _ = measure_memory("sparsify")
    assert growth < 0.3 + block


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calibration_memory_does_not_grow_with_the_text():
    peaks = [measure_memory("calibrate", repeats)[2] for repeats in ("2", "20")]
    activations = 18 * 2 * 64 * 8 * (3 * 1024 + 1024 + 2 * 1024 + 4096) * 4  # what keeping them would have added
    assert peaks[1] - peaks[0] < activations / 4


def test_include_and_exclude_choose_linears_and_the_schedule_fits(llama, oracle, tokens):
    calibration = was_fx.calibrate(llama, tokens, include="*", exclude=["*.k_proj", "re:.*layers[.]0[.]mlp[.].*"])
    names = list(calibration.shapes)
    assert "lm_head" in names
    assert calibration.excluded == tuple(
        name for name in find_linears(llama) if name.endswith("k_proj") or ".layers.0.mlp." in name
    )
    schedule = was_fx.uniform(calibration, 0.5, exclude="model.layers.1.*.o_proj")
    assert list(schedule.linears) == [name for name in names if name != "model.layers.1.self_attn.o_proj"]
    expected = oracle(llama, schedule)
    was_fx.sparsify(llama, schedule, prefill="all")
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, expected(tokens).logits, atol=2e-4, rtol=1e-4)


def test_a_pattern_that_matches_no_linear_is_refused(llama, tokens):
    with pytest.raises(was_fx.ScheduleError, match=r"exclude '\*\.q' matches none of 15 Linears"):
        was_fx.calibrate(llama, tokens, exclude="*.q")

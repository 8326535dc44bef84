"""The same logits on every way to run a model: dense, sparsified, compiled by hand, saved and loaded."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import was_fx
from was_fx.sparse.sparsify import sparse_state

ALL = {"prefill": "all"}
TOLERANCE = {torch.float32: {"atol": 2e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.25, "rtol": 0.05}}


@pytest.mark.parametrize(("dtype", "target"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)])
def test_all_ways_agree(llama, oracle, tokens, tmp_path, dtype, target):
    model, prompt = llama.to(dtype), tokens[:2, :12]
    dense = copy.deepcopy(model)
    schedule = was_fx.uniform(was_fx.calibrate(model, tokens), target)
    expected = dense if target == 0 else oracle(dense, schedule)
    was_fx.sparsify(model, schedule, **ALL)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert sparse_state(loaded).schedule == schedule
    was_fx.sparsify(loaded, schedule, **ALL)
    options = {"lowering": "eager", **ALL, "schedule": schedule}
    by_hand = torch.compile(copy.deepcopy(dense), backend="was", options=options)
    with torch.no_grad():
        wanted = expected(prompt).logits
        for way in (model, loaded, by_hand):
            torch.testing.assert_close(way(prompt).logits, wanted, **TOLERANCE[dtype])
    if target:
        arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        assert loaded.generate(prompt, **arguments).equal(expected.generate(prompt, **arguments))

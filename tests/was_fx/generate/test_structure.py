"""Whatever a step of a model depends on is looked at."""

import pytest
import torch
from torch import nn

import was_fx
from was_fx.generate.structure import Structure


def hook(*_):
    return None


CHANGES = {
    "module": lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Linear(64, 160, bias=False)),
    "layers in another order": lambda m: m.model.layers.insert(0, m.model.layers.pop(1)),
    "layer less": lambda m: m.model.layers.pop(1),
    "module more": lambda m: m.model.add_module("extra", nn.Identity()),
    "module gone": lambda m: setattr(m.model.layers[1].mlp, "act_fn", None),
    "parameter": lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.ones(64))),
    "parameter gone": lambda m: setattr(m.lm_head, "weight", None),
    "parameter more": lambda m: m.lm_head.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "buffer": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq.clone()),
    "buffer more": lambda m: m.model.rotary_emb.register_buffer("extra", torch.ones(1)),
    "threshold": lambda m: setattr(
        m.model.layers[0].mlp.up_proj, "was_threshold", m.model.layers[0].mlp.up_proj.was_threshold.clone()
    ),
    "counting": lambda m: setattr(m.model.layers[0].mlp.up_proj, "was_counts", torch.zeros(2, dtype=torch.int64)),
    "hook": lambda m: m.model.layers[1].register_forward_hook(hook),
    "hook before": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(hook),
    "densified": was_fx.densify,
    "on another device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_change_is_noticed(sparse, change):
    structure = Structure(sparse)
    assert structure.is_unchanged()
    change(sparse)
    assert not structure.is_unchanged()


def test_hook_that_is_taken_off_is_noticed(sparse):
    handle = sparse.model.norm.register_forward_hook(hook)
    structure = Structure(sparse)
    handle.remove()
    assert not structure.is_unchanged()


@torch.no_grad()
def test_use_and_other_numbers_are_no_change(sparse, tokens, calibration):
    structure = Structure(sparse)
    sparse(tokens)
    sparse.generate(tokens[:1, :5], max_new_tokens=3, do_sample=False)
    was_fx.sparsify(sparse, was_fx.uniform(calibration, 0.3))
    sparse.model.norm.weight.mul_(2)
    assert structure.is_unchanged()

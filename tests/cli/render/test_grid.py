"""Labels of projections."""

import pytest

from was_fx.cli.render.grid import short_names


@pytest.mark.parametrize(
    ("projections", "labels"),
    [
        (["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"], ["q", "k", "gate"]),
        (["self_attn.qkv_proj", "mlp.gate_up_proj"], ["qkv", "gate_up"]),
        (["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["attn", "attn.proj", "fc", "mlp.proj"]),
        (["self_attn.q_proj", "self_attn.dense", "mlp.fc1"], ["q_proj", "dense", "fc1"]),
        (["e.0.up_proj", "e.1.up_proj", "e.0.gate_proj"], ["0.up", "1.up", "gate"]),
        (["a.x.up_proj", "b.x.up_proj"], ["a.x.up_proj", "b.x.up_proj"]),
        (["up_proj"], ["up_proj"]),
        ([], []),
    ],
)
def test_labels_are_short_and_differ(projections, labels):
    assert list(short_names(projections).values()) == labels

"""Schedules from released folders."""

import pytest
import torch

from was_fx import import_release
from was_fx.modules.linears import body_linears
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.released.importer import projection_names, released_schedule
from was_fx.schedules.score import channel_norms

SHAPES = {
    f"model.layers.{block}.{name}_proj": shape
    for block in range(2)
    for name, shape in {
        "self_attn.q": (64, 32),
        "self_attn.k": (16, 32),
        "self_attn.v": (16, 32),
        "self_attn.o": (32, 64),
        "mlp.gate": (96, 32),
        "mlp.up": (96, 32),
        "mlp.down": (32, 96),
    }.items()
}


def scores(shapes=SHAPES, tokens=64):
    generator = torch.Generator().manual_seed(0)
    names = projection_names(shapes)
    return {place: torch.randn(tokens, shapes[name][1], generator=generator) for place, name in names.items()}


def rows(*levels):
    """Table rows in which projections differ, and k goes beyond everything at the last."""
    return [
        (level, {"q": level, "k": 2 * level, "v": 0.0, "o": level, "gate": level / 2, "up": level, "down": level})
        for level in levels
    ]


def test_each_block_gets_the_row_nearest_its_level(tmp_path, write_release):
    folder = write_release(tmp_path / "Some-7B", "was", scores(), rows(0.2, 0.4, 0.6))
    found = import_release(folder, [0.21, 0.55], SHAPES, fingerprint={"architecture": "Llama"})
    sparsities = {name: round(entry.sparsity, 6) for name, entry in found.linears.items()}
    assert sparsities["model.layers.0.self_attn.q_proj"] == 0.2
    assert sparsities["model.layers.1.self_attn.q_proj"] == 0.6
    assert sparsities["model.layers.1.mlp.gate_proj"] == 0.3
    assert sparsities["model.layers.1.self_attn.k_proj"] == 0.999  # the table has 1.2
    assert found.linears["model.layers.0.self_attn.v_proj"].threshold == 0
    meta = found.metadata
    assert (meta.recipe, meta.target, meta.calibration_tokens) == ("was", pytest.approx(0.38), 64)
    assert meta.source == {"method": "WAS", "folder": "Some-7B", "levels": [0.21, 0.55]}
    assert meta.fingerprint == {"architecture": "Llama"}
    assert list(found.linears) == list(SHAPES)


@pytest.mark.parametrize(
    ("method", "norm", "exponents"),
    [
        ("teal", 1, dict.fromkeys("qkvo", 0.0)),
        ("was", 1, dict.fromkeys("qkvo", 1.0)),
        ("wina", 2, {"q": 0.0, "k": 1.0, "v": 0.0, "o": 0.0, "gate": 1.0, "up": 0.0, "down": 0.0}),
    ],
)
def test_the_score_is_the_methods(tmp_path, write_release, method, norm, exponents):
    found = import_release(write_release(tmp_path, method, scores()), 0.5, SHAPES)
    assert found.norm == norm
    names = projection_names(SHAPES)
    assert {p: found.linears[names[0, p]].exponent for p in exponents} == exponents


@pytest.mark.parametrize("method", ["teal", "was", "wina"])
def test_thresholds_drop_from_a_models_inputs_what_the_table_says(tmp_path, write_release, llama, tokens, method):
    """Histograms of the model's own activations: the imported thresholds must be in the units of its score."""
    linears = body_linears(llama)
    norm = {"teal": 1, "was": 1, "wina": 2}[method]
    norms = {name: channel_norms(linear.weight, norm) for name, linear in linears.items()}
    inputs = {}
    for name, linear in linears.items():
        linear.module.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0].detach()))
    with torch.no_grad():
        llama(input_ids=tokens)
    measured = {}
    for place, name in projection_names(linears).items():
        weighed = method == "was" or (method == "wina" and place[1] in ("k", "gate"))
        both_signs = torch.cat([inputs[name], -inputs[name]])  # signed histograms are taken to be symmetric
        measured[place] = both_signs * norms[name] if weighed else both_signs
    shapes = {name: linear.shape for name, linear in linears.items()}
    found = import_release(write_release(tmp_path, method, measured), 0.25, shapes)
    for name, entry in found.linears.items():
        dropped = inputs[name].abs() <= entry.channel_thresholds(norms[name])
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.015), name


def test_a_model_of_other_widths_is_refused(tmp_path, write_release):
    folder = write_release(tmp_path, "was", scores())
    wider = {name: (64, 96) if name.endswith("o_proj") else shape for name, shape in SHAPES.items()}
    with pytest.raises(ScheduleError, match="another number of channels") as caught:
        import_release(folder, 0.5, wider)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"model.layers.{block}.self_attn.o_proj" for block in range(2)
    ]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (0.95, "block 1: the level 0.95 is outside the table, which reaches 0.9"),
        ([0.5], "there are 1 levels for 2 blocks"),
        ([0.5, -0.5], "block 1: the level -0.5 is outside"),
    ],
)
def test_levels_that_cannot_be_had_are_refused(tmp_path, write_release, levels, message):
    folder = write_release(tmp_path, "teal", scores())
    with pytest.raises(ScheduleError, match=message):
        import_release(folder, levels, SHAPES)


def test_a_model_of_other_projections_is_refused():
    fused = {"h.0.attn.qkv_proj": (96, 32), "h.0.attn.o_proj": (32, 32)}
    sparsities = {(0, "q"): 0.5, (0, "o"): 0.5}
    with pytest.raises(ScheduleError, match=r"(?s)the model has no q.*h\.0\.attn\.qkv_proj has no sparsity"):
        released_schedule("was", sparsities, lambda *_: 1.0, fused)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_head"], "lm_head is outside the blocks"),
        (["a.0.q_proj", "b.0.q_proj"], "are both q of block 0"),
        ([], "there are no Linears"),
    ],
)
def test_models_without_equal_blocks_are_refused(names, message):
    with pytest.raises(ScheduleError, match=message):
        projection_names(dict.fromkeys(names, (4, 4)))

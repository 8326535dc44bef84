import pytest

from was_fx.schedules.names import split_name, suggestion, unknown_problems


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.up_proj", (0, "mlp.experts.7.up_proj")),
        ("4", (4, "")),
        ("lm_head", (None, "lm_head")),
        ("encoder.layer1.dense", (None, "encoder.layer1.dense")),
    ],
)
def test_split_name(name, expected):
    assert split_name(name) == expected


def test_suggestion_names_the_closest():
    known = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert suggestion("layers.0.mlp.up_proj", known) == " (did you mean model.layers.0.mlp.up_proj?)"
    assert suggestion("zzz", known) == ""


def test_only_the_first_unknown_names_get_a_suggestion():
    problems = unknown_problems([f"layer.{number}" for number in range(30)], ["layers"], "is unknown")
    assert problems[0] == "layer.0 is unknown (did you mean layers?)"
    assert problems[19].endswith("(did you mean layers?)")
    assert problems[20] == "layer.20 is unknown"
    assert len(problems) == 30

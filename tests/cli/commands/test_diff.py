"""`was diff`."""

import pytest


def test_differences_by_linear_projection_and_depth(was):
    outcome = was("diff", "was-llama-2-7b-60", "was-llama-2-7b-75")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert ["31", "+25.0", "+40.0", "0.0", "+10.0", "+14.9", "+17.7", "+9.3"] in rows
    assert ["down", "69.8", "%", "83.3", "%", "+13.5"] in rows
    assert ["28–31", "58.1", "%", "73.8", "%", "+15.6"] in rows
    assert "target: 0.6 → 0.75" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    assert "\x1b" not in outcome.stdout


def test_json_has_both_sides_of_everything(was):
    found = was("diff", "was-llama-2-7b-60", "was-llama-2-7b-75", "--json").json
    one = found["linears"]["model.layers.31.self_attn.k_proj"]
    assert (one["a"], one["b"]) == pytest.approx((0.4, 0.8))
    assert one["change"] == pytest.approx(0.4)
    assert found["b"]["sparsity"] - found["a"]["sparsity"] == pytest.approx(0.15, abs=1e-3)
    assert found["metadata"]["target"] == [0.6, 0.75]


def test_a_schedule_and_itself(was):
    outcome = was("diff", "teal-mistral-7b-50", "teal-mistral-7b-50")
    assert "224 of 224 Linears are the same, thresholds too" in outcome.stdout
    assert "+" not in outcome.stdout


def test_schedules_of_other_models_are_refused(was, schedule, tmp_path):
    from was_fx import LinearSchedule, Schedule

    Schedule({"h.0.fc": LinearSchedule(0.5, 1.0, 1.0)}, {"h.0.fc": (4, 8)}).save(tmp_path / "other")
    assert "have no Linear in common" in was("diff", schedule, tmp_path / "other").error
    assert "other shapes" in was("diff", schedule, "teal-mistral-7b-50").stdout
    assert "did you mean teal-mistral-7b-50?" in was("diff", schedule, "teal-mistral-7b-5").error


def test_has_examples(was):
    outcome = was("diff", "--help")
    assert outcome.code == 0
    assert "Examples" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80

"""`was bench`: its table and its JSON, with the timing itself pretended."""

import pytest

from was_fx.measure import speed
from was_fx.measure.speed import SpeedRow

CPU = [
    SpeedRow(0.0, 0.0, 20.0, (20.0,), 1.0, 10**9, prompt_tokens=128, prompt_ms=300.0, first_generate_s=9.0),
    SpeedRow(0.5, 0.49, 10.0, (10.0,), 2.0, 6 * 10**8, prompt_tokens=128, prompt_ms=310.0, first_generate_s=0.5),
]
GPU = [
    SpeedRow(0.0, 0.0, 6.0, (5.6,), 1.0, 15 * 10**9, 5.6, 2048, 67.0, 44.0, None, 744, True, 40 * 10**9),
    SpeedRow(0.5, 0.508, 3.2, (3.1,), 1.82, 8 * 10**9, 3.1, 2048, 65.0, 32.0, 0, 337, True, 40 * 10**9),
]


@pytest.fixture
def timed(monkeypatch):
    """Makes `decode_speed` give rows; what it was called with."""
    asked: list = []

    def pretend(rows):
        monkeypatch.setattr(speed, "decode_speed", lambda model, targets, **settings: asked.append(targets) or rows)
        return asked

    return pretend


@pytest.mark.parametrize("rows", [CPU, GPU], ids=["CPU", "GPU"])
def test_a_table_within_eighty_columns(was, timed, rows):
    asked = timed(rows)
    outcome = was("bench", "embedded", "--target", "50%", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    assert asked == [[0.5]]
    table = outcome.stdout.splitlines()[:-1]
    assert max(map(len, table)) <= 80
    for shown in ("dense", "50.0 %", f"{rows[1].ratio:.2f}×"):
        assert any(shown in line for line in table), outcome.stdout
    assert ("ms/step" in outcome.stdout) == (rows is GPU)
    assert f"sparse {rows[1].prompt_ms:.0f} ms" in outcome.stdout


def test_the_lowering_is_passed_on(was, monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "decode_speed", lambda *_, **given: asked.append(given["lowering"]) or CPU)
    assert (
        was("bench", "embedded", "--device", "cpu", "--lowering", "recorded", "--json").json["lowering"] == "recorded"
    )
    assert was("bench", "embedded", "--device", "cpu", "--json").json["lowering"] is None
    assert asked == ["recorded", None]


def test_json_holds_every_field(was, timed):
    timed(GPU)
    found = was("bench", "embedded", "--device", "cpu", "--json").json
    assert found["model"] == "embedded"
    assert [row["step_ms"] for row in found["rows"]] == [5.6, 3.1]
    assert found["rows"][0]["recompiled"] is None


@pytest.mark.parametrize("target", ["100%", "0.5x"])
def test_a_bad_target_is_refused(was, target):
    assert was("bench", "embedded", "--target", target).code != 0

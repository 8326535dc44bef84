"""`was recommend`."""

import math
import sys

import pytest

from was_fx import Schedule, embedded
from was_fx.cli.commands.recommend import parse_loss


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(embedded.text("validation")[:6000], encoding="utf-8")
    return path


def arguments(model, out, prose, *more):
    return ["recommend", model, "--text", prose, "--out", out, "--length", 64, "--tokens", 512, *more]


def test_it_writes_a_schedule_a_table_a_picture_and_the_next_command(was, other_model, tmp_path, prose):
    out, plot = tmp_path / "s.was.safetensors", tmp_path / "curve.png"
    outcome = was(*arguments(other_model, out, prose, "--loss", "0.3%", "--plot", plot))
    assert outcome.code == 0, outcome.stderr
    schedule = Schedule.load(out)
    assert schedule.metadata.recipe == "fisher"
    assert f"sparsity {100 * schedule.sparsity:.1f} %" in outcome.stdout
    assert "was generate" in outcome.stdout
    assert "try --weights fp32 --weights int8" in outcome.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "calibrating" in outcome.stderr
    assert "timing" in outcome.stderr
    assert max(map(len, outcome.stdout[: outcome.stdout.index("Within")].splitlines())) <= 80


def test_json_has_all_points_and_formats_are_compared(was, other_model, tmp_path, prose):
    out = tmp_path / "s.was.safetensors"
    more = ("--weights", "none", "--weights", "int8", "--valid", prose, "--no-speed", "--loss", "0.01", "--json")
    found = was(*arguments(other_model, out, prose, *more)).json
    assert found["budget"] == 0.01
    assert {point["weights"] for point in found["points"]} == {"fp32", "int8"}
    assert found["best"]["weights"] == "int8"
    assert found["best"]["ms_per_token"] is None
    assert Schedule.load(found["path"]).sparsity == pytest.approx(found["best"]["target"], abs=1e-6)


@pytest.mark.parametrize(("text", "nats"), [("1%", math.log(1.01)), ("0.02", 0.02), (" 200 % ", math.log(3))])
def test_a_loss_is_a_share_of_perplexity_or_nats(text, nats):
    assert parse_loss(text) == pytest.approx(nats)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--loss", "0"], 2, "is not above 0"),
        (["--loss", "little"], 2, "1% of perplexity, or nats"),
        (["--resume"], 2, "--log"),
        (["--plot", "{tmp}/x.gif"], 2, "must end in .png"),
        (["--weights", "int3"], 1, "expected one of int8"),
        (["--weights", "bf16"], 1, "weights are fp32, not bf16"),
        (["--tokens", "32"], 1, "too few for windows of 64"),
        (["--tokens", "128"], 1, "the text has 2 sequences; at least 3"),
        (["--text", "{tmp}/none.txt"], 1, "none.txt"),
    ],
)
def test_refusals(was, other_model, tmp_path, prose, more, code, message):
    out = tmp_path / "s.was.safetensors"
    outcome = was(*arguments(other_model, out, prose, *[each.format(tmp=tmp_path) for each in more]))
    assert outcome.code == code, outcome
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert not out.exists()


def test_without_matplotlib_the_error_says_what_to_install(was, other_model, tmp_path, prose, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    more = ("--loss", "50%", "--no-speed", "--plot", tmp_path / "p.png")
    outcome = was(*arguments(other_model, tmp_path / "s.st", prose, *more))
    assert outcome.code == 1
    assert "pip install 'was-fx[plot]'" in outcome.error

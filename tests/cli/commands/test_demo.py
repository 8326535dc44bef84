"""`was demo`: its parts, and the whole of `--fast`."""

import io
import shlex
import signal
import sys

import pytest
import torch

from was_fx import Evaluation, embedded
from was_fx.cli.main import main
from was_fx.cli.render import demo_screens as screens
from was_fx.cli.render.console import PlainConsole
from was_fx.measure.speed import SpeedRow, decode_speed


@pytest.mark.slow
def test_fast_runs_and_gives_json(was):
    outcome = was("demo", "--fast", "--json")
    assert outcome.code == 0, outcome.stderr
    found = {(row["score"], row["target"]): row for row in outcome.json["quality"]}
    dense = found["dense", 0.0]["perplexity"]
    assert dense < found["was", 0.25]["perplexity"] < found["was", 0.5]["perplexity"] < found["was", 0.75]["perplexity"]
    assert found["teal", 0.5]["realised"] == pytest.approx(0.5, abs=0.05)
    assert outcome.json["samples"]["dense"]
    better = {row["what"]: row for row in outcome.json["better"]}
    assert better["uniform"]["perplexity"] == found["was", 0.5]["perplexity"]
    assert better["fisher"]["perplexity"] < better["uniform"]["perplexity"]
    assert better["int8"]["perplexity"] == pytest.approx(dense, rel=0.02)
    assert better["int8, fisher"]["bytes"] < better["int8"]["bytes"] < better["uniform"]["bytes"]
    assert outcome.json["speed"] == []


def test_screens_fit_eighty_columns():
    console = PlainConsole(io.StringIO(), width=80)
    rows = {("dense", 0.0): Evaluation(3.8, 28616, 0.0, 0.0, {}, 0.0)}
    rows |= {
        (score, level): Evaluation(9.1, 28616, level, level, {}, 0.4)
        for level in (0.4, 0.5)
        for score in ("was", "teal")
    }
    screens.opening(console)
    screens.quality(console, rows, ("was", "teal"))
    screens.better(
        console,
        rows["dense", 0.0],
        {"fisher": (rows["was", 0.5], 2 * 10**9), "uniform": (rows["was", 0.5], 10**9)},
        0.5,
    )
    screens.samples(console, "It was", {"dense": " a [bold]night[/].", "sparse": " a day."})
    times = {name: SpeedRow(s, s, 10.0, (10.0,) * 5, 1.0, 10**9) for name, s in (("dense", 0.0), ("int8, 50 %", 0.5))}
    screens.speed(console, times, 2)
    screens.closing(console)
    drawn = console.file.getvalue()
    assert max(map(len, drawn.splitlines())) <= 80
    assert "[bold]night[/]" in drawn
    assert "1,000.0 MB" in drawn
    assert "int8, 50 %" in drawn
    assert "1,200.0 MB" in drawn


# What makes the commands at the end of the demo quick.
SHORT = {
    "search": ("--tokens", "256", "--length", "64"),
    "report": ("--limit", "1", "--length", "64", "--max-new-tokens", "3", "--repetitions", "1", "--lowering", "eager"),
    "bench": ("--repetitions", "1", "--lowering", "eager"),
    "generate": ("--max-new-tokens", "3"),
}


@pytest.mark.slow
def test_the_commands_at_its_end_lead_to_a_schedule_a_report_and_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "MODEL").symlink_to(embedded.path(), target_is_directory=True)
    for name, part in (("book.txt", "calibration"), ("other.txt", "test")):
        (tmp_path / name).write_text(embedded.text(part)[:4000], encoding="utf-8")
    for _, command in screens.NEXT:
        _, name, *rest = shlex.split(command)
        monkeypatch.setattr(sys, "argv", ["was", name, *rest, *SHORT[name]])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code in (0, None), capsys.readouterr().err
        assert capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"schedule.was.safetensors", "report.html"}
    assert len(screens.NEXT) == 4


@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )


def test_decode_speed_gives_the_dense_row_and_one_per_target(tiny):
    runs = []
    rows = decode_speed(
        tiny, [0.5, 0.75], tokens=4, prompt=4, repetitions=2, lowering="eager", progress=lambda *done: runs.append(done)
    )
    assert [row.target for row in rows] == pytest.approx([0.0, 0.5, 0.75])
    assert [row.realised for row in rows] == pytest.approx([0.0, 0.5, 0.75], abs=0.1)
    assert all(len(row.repetitions) == 2 and row.ms_per_token > 0 for row in rows)
    assert rows[0].bytes_per_token > rows[1].bytes_per_token > rows[2].bytes_per_token
    assert runs[-1] == (9, 9)


def test_decode_speed_leaves_the_model_dense(tiny):
    from was_fx.measure.speed import random_model

    model = random_model(tiny)
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    decode_speed(model, [0.5], tokens=2, prompt=2, repetitions=1, lowering="eager")
    after = model.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].stride() == stride for name, (value, stride) in before.items()
    )


def test_decode_speed_refuses_too_few_tokens(tiny):
    with pytest.raises(ValueError, match="at least 2, 1 and 1"):
        decode_speed(tiny, [0.5], tokens=1)

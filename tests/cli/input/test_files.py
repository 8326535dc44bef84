"""Schedules by file or by published name."""

from pathlib import Path

import pytest

from was_fx import load_published
from was_fx.cli.input.files import load_schedule

NAME = "teal-mistral-7b-50"


def test_a_published_name_stands_for_its_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_schedule(Path(NAME)) == load_published(NAME)
    load_published("was-mistral-7b-75").save(NAME)
    assert load_schedule(Path(NAME)) == load_published("was-mistral-7b-75")  # a file comes first


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}"),
        ("check", "embedded", "--schedule", "{}"),
        ("ppl", "embedded", "--schedule", "{}", "--limit", "1"),
        ("generate", "embedded", "--prompt", "It", "--schedule", "{}"),
        ("recalibrate", "embedded", "{}", "--tokens", "512"),
        ("compare", "{}"),
    ],
)
def test_every_command_takes_a_published_name_and_suggests_one(was, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    more = ["--out", "new.safetensors"] if arguments[0] == "recalibrate" else []
    wrong = was(*[each.format("teal-mistral-7b-5") for each in arguments], *more)
    assert wrong.code == 1
    assert f"did you mean {NAME}?" in wrong.error
    right = was(*[each.format(NAME) for each in arguments], *more)
    if "embedded" in arguments:  # found, and of another model
        assert "the schedule does not fit the model" in right.error
    else:
        assert right.code == 0


def test_a_wrong_file_gets_the_nearest_one_beside_it(was, tmp_path):
    load_published(NAME).save(tmp_path / "mistral50.was.safetensors")
    assert "did you mean mistral50.was.safetensors?" in was("inspect", tmp_path / "mistral55.was.safetensors").error
    assert "did you mean" not in was("inspect", tmp_path / "x").error

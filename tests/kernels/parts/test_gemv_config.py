"""Tile sizes: measured ones first, a rule for the rest."""

import json

import pytest
import torch

from was_fx.kernels.parts import gemv_config
from was_fx.kernels.parts.gemv_config import ExpertsShape, GemvConfig, LinearsShape, heuristic, tuned

ENTRY = {"rows": 16, "columns": 64, "splits": 3, "warps": 8}
OTHER = {**ENTRY, "splits": 5}
KEY = "64,32+16,float32"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Writes {key: entry} as the shipped and the user's file of the CPU."""

    def write(shipped=None, user=None):
        for name, entries in (("shipped", shipped), ("user/was_fx/tuned", user)):
            if entries is not None:
                folder = tmp_path / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cpu.json").write_text(
                    entries if isinstance(entries, str) else json.dumps({"configurations": entries})
                )

    monkeypatch.setattr(gemv_config, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    tuned.cache_clear()
    yield write
    tuned.cache_clear()


def chosen(sizes=(32, 16)):
    return gemv_config.gemv_config(torch.device("cpu"), torch.float32, 64, sizes)


@pytest.mark.parametrize(
    ("shipped", "user", "expected"),
    [
        (None, None, heuristic(64, [32, 16], torch.float32)),
        ({KEY: ENTRY}, None, GemvConfig(**ENTRY)),
        (None, {KEY: ENTRY}, GemvConfig(**ENTRY)),
        ({KEY: ENTRY}, {KEY: OTHER}, GemvConfig(**OTHER)),
        ({KEY: ENTRY}, {"64,32,float32": OTHER}, GemvConfig(**ENTRY)),
        ({"64,32+16,bfloat16": ENTRY}, None, heuristic(64, [32, 16], torch.float32)),
    ],
)
def test_measured_shapes_come_before_the_rule_and_the_users_before_the_shipped(folders, shipped, user, expected):
    folders(shipped, user)
    assert chosen() == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"configurations": []}',
        '{"configurations": {"k": {"rows": 16}}}',
        json.dumps({"configurations": {KEY: {**ENTRY, "speed": 1}}}),
        json.dumps({"configurations": {KEY: {**ENTRY, "rows": 17}}}),
        json.dumps({"configurations": {KEY: {**ENTRY, "splits": 0}}}),
        json.dumps({"configurations": {KEY: {**ENTRY, "warps": "4"}}}),
    ],
)
def test_bad_file_is_named_with_what_to_do(folders, text):
    folders(user=text)
    with pytest.raises(ValueError, match=r"cpu\.json is not a tuning file .*was tune"):
        chosen()


@pytest.mark.parametrize("channels", [1, 127, 4096, 14336])
@pytest.mark.parametrize("sizes", [(1,), (4096, 1024, 1024), (14336, 14336), (151936,)])
@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16, "int8", "int4"], ids=str)
@pytest.mark.parametrize("multiprocessors", [16, 108, 142])
def test_rule_serves_every_shape(channels, sizes, format, multiprocessors):
    config = heuristic(channels, sizes, format, multiprocessors)
    assert 1 <= config.splits <= 16
    assert config.splits == 1 or channels // config.splits >= 128


@pytest.mark.parametrize(("format", "each"), [(torch.bfloat16, 3), ("int8", 2), ("int4", 2)], ids=str)
def test_rule_gives_each_multiprocessor_a_few_programs(format, each):
    for multiprocessors in (20, 58, 108, 128, 142):
        for channels, outputs in ((4096, 4096), (14336, 4096), (4096, 14336)):
            config = heuristic(channels, [outputs], format, multiprocessors)
            tiles = outputs // config.columns
            unlimited = 1 < config.splits < (16 if each == 3 else 8)
            programs = tiles * config.splits
            assert not unlimited or abs(programs - each * multiprocessors) <= tiles / 2


def test_key_and_file_name_are_readable(monkeypatch):
    assert LinearsShape(4096, (4096, 1024), torch.bfloat16).key == "4096,4096+1024,bfloat16"
    assert LinearsShape(4096, (4096, 1024), "int4").key == "4096,4096+1024,int4"
    assert ExpertsShape(2048, 1536, 8, "int8").key == "2048,8*1536,int8"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert gemv_config.device_file("cuda") == "nvidia_h100_80gb_hbm3.json"
    assert gemv_config.device_file("cpu") == "cpu.json"


def test_shipped_files_are_valid(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.cache_clear()
    files = sorted(gemv_config.SHIPPED.glob("*.json"))
    assert files
    for path in files:
        assert tuned(path.name)
    tuned.cache_clear()

"""`benchmarks/tiles_in_chain.py`, under Triton's interpreter and with times that are made up."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from was_fx.kernels.parts.gemv_config import GemvConfig
from was_fx.kernels.parts.triton_parts import interpreted

FOLDER = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not interpreted(), reason="tries it out without a GPU")


@pytest.fixture(scope="module")
def script():
    names = ("environment", "gpu_kernels", "block_chain", "tiles_in_chain")
    for name in names:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    yield module
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def chain(script, loops):
    return script.Chain(script.TINY, torch.float32, "cpu")


def test_other_tiles_give_the_same_token(chain):
    kept = {name: case[2].sum(-1).tolist() for name, case in chain.cases.items()}
    assert kept == {"qkv": [32] * 3, "o": [32], "gate_up": [32] * 2, "down": [64]}
    others = {name: GemvConfig(32, 64, 2, 2) for name in chain.shapes}
    expected, y = (chain.run(configs, 0.75).sum(0) for configs in (chain.present, others))
    assert expected.std() > 0.1
    torch.testing.assert_close(y, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("right", "rows"), [(lambda config: True, 16), (lambda config: config.rows > 16, 32)])
def test_the_fastest_right_tiles_are_taken(script, chain, monkeypatch, right, rows):
    monkeypatch.setattr(chain, "times", lambda several, *_: [sum(c.rows for c in each.values()) for each in several])
    monkeypatch.setattr(script, "correct", lambda shape, configs, case: [each for each in configs if right(each)])
    search = script.Search(chain, 60)
    search.descend()
    assert {name: config.rows for name, config in search.best.items()} == dict.fromkeys(script.ORDER, rows)
    assert search.result()["us"]["0.5"] == {"before": 4 * 64, "after": 4 * rows}


@pytest.mark.usefixtures("loops")
def test_what_is_chosen_goes_into_the_file(script, monkeypatch, tmp_path, capsys):
    def times(chain, several, *_):
        return [100 - 10 * sum(each[name] != chain.present[name] for name in each) for each in several]

    monkeypatch.setattr(script.Chain, "times", times)
    monkeypatch.setattr(script, "TINY_FORMATS", {"int8": "int8", "int4": "int4"})
    entry = {"rows": 64, "columns": 64, "splits": 1, "warps": 4}
    keys = ("128,64,int8", "4096,4096,int8")
    path = tmp_path / "cpu.json"
    path.write_text(
        json.dumps({"configurations": dict.fromkeys(keys, entry), "microseconds": {key: {} for key in keys}})
    )
    monkeypatch.setattr(sys, "argv", ["tiles_in_chain.py", "--tiny", "--out", str(path)])
    script.main()
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["format"] for row in rows] == ["int8", "int4"]
    assert all(row["us"]["0.75"] == {"before": 100, "after": 60} for row in rows)
    assert "100.0 → 60.0" in printed
    content = json.loads(path.read_text())
    chosen = {found["key"]: found["after"] for row in rows for found in row["products"].values()}
    assert len(chosen) == 8
    assert content["configurations"] == {keys[1]: entry} | chosen
    assert content["microseconds"] == {keys[1]: {}}
    assert content["device"] == rows[0]["device"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one MODEL:FORMAT"),
        (["llama-3-8b"], "'llama-3-8b' is no MODEL:FORMAT"),
        (["mixtral-8x7b:int4"], "models: llama-3-8b"),
        (["--tiny", "--out", "{folder}/no/file.json"], "is no folder"),
        (["--tiny", "--out", "{folder}/other.json"], "is no file of tuned configurations"),
        (["--tiny", "--out", "{folder}/h200.json"], "is of NVIDIA H200"),
        pytest.param(
            ["llama-3-8b:int4"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(script, monkeypatch, tmp_path, capsys, arguments, message):
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "h200.json").write_text('{"configurations": {}, "microseconds": {}, "device": "NVIDIA H200"}')
    monkeypatch.setattr(sys, "argv", ["tiles_in_chain.py", *(each.format(folder=tmp_path) for each in arguments)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err

"""`scripts/make_published.py`, on small tables in the format of its data."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from was_fx import Schedule

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_published.py"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COLUMNS = ("effective_sparsity", "activation_error", "baseline_error", *PROJECTIONS)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_published", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(script, tmp_path_factory) -> Path:
    """Rows at 40, 50, 60 and 75 % in which gate has 5 % less; τ = sparsity · (block + 1), below 0 near 0."""
    folder = tmp_path_factory.mktemp("data")
    blocks = {"0.4": [0.4] * 32, "0.6": [0.6] * 31 + [0.74], "0.75": [0.75] * 32}
    text = json.dumps({name: blocks for name in script.WAS_MODELS.values()})
    (folder / "was_block_sparsities.json").write_text(text)
    rows = [[s, 0, 0, *(s - 0.05 * (p == "gate") for p in PROJECTIONS)] for s in (0.4, 0.5, 0.6, 0.75)]
    rows.append([np.nan] * len(COLUMNS))
    level = np.arange(100) / 100
    threshold = (np.arange(32)[:, None, None] + 1) * np.broadcast_to(level, (32, 7, 100))
    tables = {"level": level, "greedy_lookup": np.array([rows] * 32), "threshold": threshold - 0.01}
    tables = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tables.items()}
    metadata = {"lookup_columns": ",".join(COLUMNS), "projections": ",".join(PROJECTIONS)}
    for method, models in (("was", script.WAS_MODELS), ("teal", script.TEAL_MODELS)):
        for model in models:
            save_file(tables, folder / f"{method}_{model}.safetensors", metadata)
    return folder


def make(script, data, out, monkeypatch) -> dict[str, bytes]:
    monkeypatch.setattr(sys, "argv", ["make_published.py", str(data), "--out", str(out)])
    script.main()
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_same_data_gives_the_same_bytes(script, data, tmp_path, monkeypatch, capsys):
    first = make(script, data, tmp_path / "first", monkeypatch)
    assert first == make(script, data, tmp_path / "second", monkeypatch)
    assert len(first) == 15
    assert "was-llama-2-7b-60.safetensors: published as 60 %" in capsys.readouterr().out


def test_blocks_get_the_row_nearest_their_level_and_its_thresholds(script, data, tmp_path, monkeypatch):
    make(script, data, tmp_path, monkeypatch)
    linears = Schedule.load(tmp_path / "was-llama-2-7b-60.safetensors").linears
    assert linears["model.layers.0.mlp.up_proj"].sparsity == pytest.approx(0.6)
    assert linears["model.layers.0.mlp.up_proj"].threshold == pytest.approx(0.59, rel=1e-4)
    assert linears["model.layers.0.mlp.gate_proj"].threshold == pytest.approx(0.54, rel=1e-4)
    assert linears["model.layers.31.mlp.up_proj"].sparsity == pytest.approx(0.75)
    assert linears["model.layers.31.mlp.up_proj"].threshold == pytest.approx(32 * 0.75 - 0.01, rel=1e-4)


def test_a_sparsity_beyond_the_threshold_table_is_refused(script, data):
    tables = script.read_tables(data / "was_mistral-7b.safetensors")
    with pytest.raises(ValueError, match=r"block 3, k: 0\.995 is beyond"):
        tables.threshold(3, "k", 0.995)
    assert tables.threshold(0, "k", 0.0) == 0.0

"""`was inspect`."""

import csv
import io
import json

import pytest
import torch

from was_fx import LinearSchedule, Schedule
from was_fx.cli.render.console import PlainConsole
from was_fx.cli.render.contents import show_schedule


def test_a_schedule_is_a_table_of_blocks_by_projections(was, schedule):
    outcome = was("inspect", schedule)
    assert outcome.code == 0
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert ["block", "q", "k", "v", "o", "gate", "up", "down"] in lines
    assert ["5"] + ["50.0"] * 7 in lines
    assert "50.00 % nominal, target 50 %" in outcome.stdout
    assert "embedded:calibration, 1,024 tokens" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    assert "\x1b" not in outcome.stdout


def test_thresholds_take_the_place_of_sparsities(was, schedule):
    outcome = was("inspect", schedule, "--thresholds")
    threshold = Schedule.load(schedule).linears["model.layers.0.self_attn.q_proj"].threshold
    assert f"{threshold:.3g}" in outcome.stdout


def test_a_calibration_is_a_table_of_quantiles(was, calibration):
    outcome = was("inspect", calibration)
    assert outcome.code == 0
    assert "25 % 50 % 75 % 90 %" in " ".join(outcome.stdout.split())
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_json_of_both_kinds(was, schedule, calibration):
    found = was("inspect", schedule, "--json").json
    assert (found["kind"], found["sparsity"], len(found["linears"])) == ("schedule", 0.5, 42)
    assert found["metadata"]["recipe"] == "uniform"
    found = was("inspect", calibration, "--json").json
    assert (found["kind"], found["tokens"], len(found["linears"])) == ("calibration", 1024, 42)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no was-fx schedule here"),
        (b"", "not a safetensors file"),
        (b"\xff" * 20, "not a safetensors file"),
        (b"PK\x03\x04" + b"0" * 20, "pickle or zip"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
    ],
)
def test_refuses_other_files(was, tmp_path, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    outcome = was("inspect", path)
    assert outcome.code == 1
    assert message in outcome.error


def test_refuses_a_directory_and_another_safetensors_file(was, tmp_path):
    from safetensors.torch import save_file

    assert str(tmp_path) in was("inspect", tmp_path).error
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "is not a was-fx schedule" in was("inspect", tmp_path / "model.safetensors").error


def _drawn(entries: dict[str, float], size: int = 80, **options) -> str:
    linears = {name: LinearSchedule(sparsity, 1.0, 1.0) for name, sparsity in entries.items()}
    console = PlainConsole(io.StringIO(), width=size, **options)
    show_schedule(console, "name", Schedule(linears, dict.fromkeys(entries, (4, 8))))
    return console.file.getvalue()


def test_eighty_blocks_are_eighty_rows():
    projections = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    drawn = _drawn({f"model.layers.{block}.{name}": block / 100 for block in range(80) for name in projections})
    assert sum(line.split()[1:] == ["79.0"] * 3 for line in drawn.splitlines()) == 1
    assert len(drawn.splitlines()) < 125


def test_blocks_that_differ_and_linears_outside_blocks():
    drawn = _drawn({"layers.0.attn.q_proj": 0.1, "layers.1.mlp.up_proj": 0.2, "project_in": 0.3})
    rows = [line.split() for line in drawn.splitlines()]
    assert ["0", "10.0", "·"] in rows
    assert ["1", "·", "20.0"] in rows
    assert ["project_in", "30.0"] in rows


def test_many_projections_go_into_several_tables():
    drawn = _drawn({f"layers.0.experts.{expert}.{name}_proj": 0.5 for expert in range(9) for name in ("up", "down")})
    assert drawn.count("block") > 1
    assert sum(line.split()[1:].count("50.0") for line in drawn.splitlines() if line.split()[:1] == ["0"]) == 18 + 1
    assert max(map(len, drawn.splitlines())) <= 80


def test_two_stacks_keep_their_rows_apart():
    drawn = _drawn({"encoder.layers.0.fc1": 0.1, "decoder.layers.0.fc1": 0.2})
    rows = [line.split() for line in drawn.splitlines()]
    assert ["encoder.layers.0", "10.0"] in rows
    assert ["decoder.layers.0", "20.0"] in rows


def test_cells_set_both_colours_so_that_every_terminal_can_show_them():
    entries = {"layers.0.q_proj": 0.05, "layers.0.k_proj": 0.95}
    drawn = _drawn(entries, force_terminal=True, color_system="256")
    assert "38;5;16;48;5;230" in drawn
    assert "38;5;231;48;5;88" in drawn
    assert "48;5" not in _drawn(entries, force_terminal=True, color_system="256", no_color=True)


def test_a_published_name_has_budget_speed_and_warnings(was):
    text = was("inspect", "was-llama-2-7b-60").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["block", "q", "k", "v", "o", "gate", "up", "down"] in rows
    assert any(row[:3] == ["down", "69.8", "%"] and row[-2:] == ["28.7", "%"] for row in rows)
    assert any(row[:3] == ["28–31", "58.1", "%"] for row in rows)
    assert "! model.layers.0.self_attn.q_proj drops 92.5 %, the blocks around it 52.5 %" in text
    assert "NVIDIA H100:" in text
    assert "ms per token predicted" in text
    assert "NVIDIA H100:" not in was("inspect", "was-llama-2-7b-60", "--gpu", "h200").stdout


def test_an_unknown_gpu_is_answered_with_the_known_ones(was):
    outcome = was("inspect", "was-llama-2-7b-60", "--gpu", "a100")
    assert outcome.code == 2
    assert "known are NVIDIA" in outcome.stderr


def test_what_is_not_predicted_says_why(was, schedule):
    found = was("inspect", schedule, "--json").json
    assert found["predicted"] == []
    assert "a token reads" in found["not_predicted"]["NVIDIA H200"]
    assert "not predicted" in was("inspect", schedule).stdout


def test_with_its_model_all_weights_count(was, schedule):
    assert "of all weights that a token reads" in was("inspect", schedule, "--model", "embedded").stdout
    found = was("inspect", schedule, "--model", "embedded", "--json").json
    assert found["other_weights"] > 0
    assert "has no Linear model.layers." in was("inspect", "was-mistral-7b-75", "--model", "embedded").error


def test_measured_results_stand_beside_the_nominal_ones(was, schedule, tmp_path):
    row = {"schedule": str(schedule), "perplexity": 50.0, "nominal": 0.5, "realised": 0.493, "bytes_saved": 0.4}
    content = {"model": "embedded", "text": "t", "prefill": "sparse", "length": 256, "results": [row]}
    (tmp_path / "ppl.json").write_text(json.dumps(content))
    text = was("inspect", schedule, "--ppl", tmp_path / "ppl.json").stdout
    assert "realised 49.3 %, 40.0 % of all weight bytes not read, perplexity 50.00" in text


def test_exports(was, schedule, tmp_path):
    out = tmp_path / "s.csv"
    assert was("inspect", schedule, "--export", out).code == 0
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42
    assert (rows[0]["block"], rows[0]["projection"], float(rows[0]["sparsity"])) == ("0", "self_attn.q_proj", 0.5)
    assert "another --export, or --force" in was("inspect", schedule, "--export", out).error
    assert was("inspect", schedule, "--export", out, "--force").code == 0
    assert was("inspect", schedule, "--export", tmp_path / "s.json").code == 0
    assert json.loads((tmp_path / "s.json").read_text()) == was("inspect", schedule, "--json").json
    assert was("inspect", schedule, "--export", tmp_path / "s.md").code == 0
    assert "| 5 |" + " 50.0 |" * 7 in (tmp_path / "s.md").read_text()


def test_refuses_other_endings_and_what_a_calibration_has_not(was, schedule, calibration, tmp_path):
    outcome = was("inspect", schedule, "--export", tmp_path / "s.xlsx")
    assert outcome.code == 2
    assert "end in .csv, .json, .md" in " ".join(outcome.stderr.replace("│", "").split())
    assert "--gpu can be given for a schedule only" in was("inspect", calibration, "--gpu", "h200").error


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("blocks", [3, 126])
def test_a_terminal_of_any_width_is_not_exceeded(width, blocks):
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.down_proj[0]")
    drawn = _drawn(
        {f"model.layers.{block}.{name}": 0.5 for block in range(blocks) for name in names},
        force_terminal=True,
        no_color=True,
        color_system=None,
        size=width,
    )
    assert max(map(len, drawn.splitlines())) <= width
    assert drawn.count("50.0▅") == blocks * 4


def test_many_blocks_stand_side_by_side_on_a_wide_terminal():
    entries = {f"layers.{block}.{name}": 0.5 for block in range(126) for name in ("q_proj", "up_proj")}
    assert len(_drawn(entries, force_terminal=True, size=200).splitlines()) < 70
    assert len(_drawn(entries, size=200).splitlines()) > 126  # piped: one row a block

"""`was inspect`."""

import io

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


def _drawn(entries: dict[str, float], **options) -> str:
    linears = {name: LinearSchedule(sparsity, 1.0, 1.0) for name, sparsity in entries.items()}
    console = PlainConsole(io.StringIO(), width=80, **options)
    show_schedule(console, "name", Schedule(linears, dict.fromkeys(entries, (4, 8))))
    return console.file.getvalue()


def test_eighty_blocks_are_eighty_rows():
    projections = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    drawn = _drawn({f"model.layers.{block}.{name}": block / 100 for block in range(80) for name in projections})
    assert sum(line.split()[1:] == ["79.0"] * 3 for line in drawn.splitlines()) == 1
    assert len(drawn.splitlines()) < 100


def test_blocks_that_differ_and_linears_outside_blocks():
    drawn = _drawn({"layers.0.attn.q_proj": 0.1, "layers.1.mlp.up_proj": 0.2, "project_in": 0.3})
    rows = [line.split() for line in drawn.splitlines()]
    assert ["0", "10.0", "·"] in rows
    assert ["1", "·", "20.0"] in rows
    assert ["project_in", "30.0"] in rows


def test_many_projections_go_into_several_tables():
    drawn = _drawn({f"layers.0.experts.{expert}.{name}_proj": 0.5 for expert in range(9) for name in ("up", "down")})
    assert drawn.count("block") > 1
    assert drawn.count("50.0 ") == 18
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

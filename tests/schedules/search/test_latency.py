"""Latency tables."""

import json

import numpy as np
import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.search.latency import LatencyTable, byte_savings

ROWS = [{"device": "X", "n": 8, "k": 4, "sparsity": s, "us": us} for s, us in ((0.0, 10.0), (0.5, 6.0), (0.75, 6.5))]
LEVELS = np.linspace(0, 1, 5)


@pytest.mark.parametrize("lines", [True, False])
def test_savings_are_read_from_json_lines_or_an_array(tmp_path, lines):
    path = tmp_path / "kernels.jsonl"
    text = "\n".join(json.dumps(row) for row in [{"device": "X"}, *ROWS]) if lines else json.dumps(ROWS)
    path.write_text(text)
    savings = LatencyTable.load(path).savings({"a": (8, 4)}, LEVELS)
    np.testing.assert_allclose(savings, [[0, 2, 4, 4, 4]])


def test_the_fastest_of_several_measures_counts():
    table = LatencyTable([*ROWS, {**ROWS[1], "us": 4.0}])
    assert table.savings({"a": (8, 4)}, LEVELS)[0, 2] == 6.0


def test_missing_shapes_are_all_named():
    with pytest.raises(ScheduleError) as caught:
        LatencyTable(ROWS).savings({"a": (8, 4), "b": (4, 4), "c": (2, 2)}, LEVELS)
    assert caught.value.problems == ["[2, 2] has 0 sparsities", "[4, 4] has 0 sparsities"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"n": 1, "k": 1, "sparsity": 0.5, "us": "fast"}], "row 1: no number for us"),
        ([{"n": 1, "k": 1, "sparsity": 1.5, "us": 1.0}], "out of range"),
        ([[1, 2]], "expected an object"),
    ],
)
def test_bad_rows_are_refused(rows, message):
    with pytest.raises(ScheduleError, match=message):
        LatencyTable(rows)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("shape,us\n1,2\n")
    with pytest.raises(ScheduleError, match="is not a latency table"):
        LatencyTable.load(path)


def test_bytes_are_linear():
    np.testing.assert_allclose(byte_savings({"a": (8, 4)}, LEVELS), [[0, 8, 16, 24, 32]])

"""Greedy tables of released folders."""

import pytest

from was_fx.schedules.released.lookup import LookupTable, read_lookup

HEADER = "Effective Sparsity,Activation Error,Baseline Error,q,down\n"
TABLE = LookupTable([0.2, 0.4, 0.6], [{"q": 0.1}, {"q": 0.5}, {"q": 1.2}])


@pytest.mark.parametrize(("level", "expected"), [(0, 0.1), (0.29, 0.1), (0.31, 0.5), (0.5, 0.5), (0.61, 1.2)])
def test_the_nearest_row_is_taken(level, expected):
    assert TABLE.nearest(level) == {"q": expected}


@pytest.mark.parametrize("level", [0.62, 1.0, -0.1, float("nan")])
def test_a_level_that_the_table_does_not_reach_is_refused(level):
    with pytest.raises(ValueError, match=r"reaches 0\.6"):
        TABLE.nearest(level)


def test_reads_what_the_releases_write(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(HEADER + "0.0038461538461538464,1.5e-05,2e-05,0.05,0.0\n0.5,nan,0.2,1.1,0.25\n")
    assert read_lookup(path) == LookupTable(
        [0.0038461538461538464, 0.5], [{"q": 0.05, "down": 0.0}, {"q": 1.1, "down": 0.25}]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the columns are ''"),
        (b"level,q\n0.1,0.1\n", "the columns are 'level,q', expected 'Effective Sparsity,"),
        (b"Effective Sparsity,Activation Error\n0.1,0.1\n", "expected 'Effective Sparsity,Activation Error,Baseline"),
        (b"Effective Sparsity,q,q\n0.1,0.1,0.1\n", "the columns are"),
        (HEADER.encode(), "no rows"),
        (HEADER.encode() + b"0.1,0,0,0.1\n", "line 2 has 4 values, expected 5"),
        (HEADER.encode() + b"0.1,0,0,0.1,0.1\n0.2,0,0,half,0\n", "line 3: q is 'half', expected a number"),
        (HEADER.encode() + b"nan,0,0,0.1,0.1\n", "line 2: Effective Sparsity is nan"),
        (HEADER.encode() + b"0.1,0,0,-0.1,0.1\n", "line 2: q is -0.1"),
        (b"\xff\xfe\x00", "no CSV text"),
        (HEADER.encode() + b'0.1,0,0,"0.1,0.1\n', "no CSV text"),
    ],
)
def test_refusals(tmp_path, text, message):
    path = tmp_path / "results.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_lookup(path)

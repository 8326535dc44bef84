"""Results are kept as soon as they are there, and found by what was measured."""

import pytest

from was_fx.choosing.results_log import ResultsLog


def test_a_result_is_found_by_what_was_measured(tmp_path):
    path = tmp_path / "results.jsonl"
    log = ResultsLog(path)
    assert log.get({"model": "a", "limit": 2}) is None
    assert log.add({"model": "a", "limit": 2}, {"loss": 1.5, "texts": ("x",)}) == {"loss": 1.5, "texts": ["x"]}
    log.add({"model": "b", "limit": 2}, {"loss": 2.5})
    again = ResultsLog(path)
    assert again.get({"limit": 2, "model": "a"}) == {"loss": 1.5, "texts": ["x"]}
    assert again.get({"limit": 3, "model": "a"}) is None


@pytest.mark.parametrize("left", [b'{"format": "was-fx res', b"{", b'{"format": "was-fx results"}'])
def test_what_a_kill_leaves_of_a_line_is_dropped(tmp_path, left):
    path = tmp_path / "results.jsonl"
    ResultsLog(path).add({"a": 1}, {"loss": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + left)
    log = ResultsLog(path)
    assert log.get({"a": 1}) == {"loss": 1.0}
    assert path.read_bytes() == whole
    log.add({"a": 2}, {"loss": 2.0})
    assert ResultsLog(path).get({"a": 2}) == {"loss": 2.0}


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "7", '{"trial": 1}', '{"format": "other", "what": {}, "result": {}}']
)
def test_another_file_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1, is no result.*move the file away"):
        ResultsLog(path)
    assert path.read_text() == line + "\n"


def test_what_json_can_not_hold_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        ResultsLog(path).add({}, {"loss": float("nan")})
    assert not path.exists()

"""The log of a search: finished trials survive, another search's log is refused."""

import json

import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.search.trial_log import TrialLog, digest

SETTINGS = {"recipe": "was", "seed": 0, "target": 0.5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def test_finished_trials_are_found_again(path):
    first = TrialLog(path, SETTINGS)
    first.add("trial 0", {"levels": [0.1, 0.2]}, {"value": 1.5})
    again = TrialLog(path, SETTINGS, resume=True)
    assert again.finished == 1
    assert again.recorded("trial 0", {"levels": [0.1, 0.2]})["value"] == 1.5
    assert again.recorded("trial 1", {}) is None
    assert [json.loads(line).get("trial") for line in path.read_text().splitlines()] == [None, "trial 0"]


def test_half_a_line_at_the_end_is_dropped(path):
    TrialLog(path, SETTINGS).add("trial 0", 0, {"value": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"trial": "trial 1", "val')
    assert TrialLog(path, SETTINGS, resume=True).finished == 1
    assert path.read_bytes() == whole


def test_a_kill_within_the_first_line_starts_anew(path):
    path.write_bytes(b'{"format": "was')
    log = TrialLog(path, SETTINGS, resume=True)
    log.add("trial 0", 0, {})
    assert TrialLog(path, SETTINGS, resume=True).finished == 1


def test_without_resume_a_log_is_not_touched(path):
    TrialLog(path, SETTINGS)
    with pytest.raises(FileExistsError, match="resume it"):
        TrialLog(path, SETTINGS)


def test_the_log_of_other_settings_is_refused_with_all_differences(path):
    TrialLog(path, SETTINGS)
    before = path.read_bytes()
    with pytest.raises(ScheduleError) as caught:
        TrialLog(path, {**SETTINGS, "seed": 1, "target": 0.6}, resume=True)
    assert caught.value.problems == [
        "seed is 0 in the log, 1 in this search",
        "target is 0.5 in the log, 0.6 in this search",
    ]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json\n", "is damaged"),
        (b'{"a": 1}\n', "not a search log of this version"),
        (b"[1, 2]\n", "not a search log"),
        (b"\xff\xfe\n", "is damaged"),
    ],
)
def test_other_files_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ScheduleError, match=message):
        TrialLog(path, SETTINGS, resume=True)
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(path):
    TrialLog(path, SETTINGS).add("trial 0", 0, {})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[1]]) + "\n")
    with pytest.raises(ScheduleError, match="line 2 is no trial"):
        TrialLog(path, SETTINGS, resume=True)


def test_another_task_under_a_known_key_is_refused(path):
    log = TrialLog(path, SETTINGS)
    log.add("trial 0", [0.1], {})
    with pytest.raises(ScheduleError, match="another one than this search would make"):
        log.recorded("trial 0", [0.2])


def test_rounding_does_not_make_another_task():
    assert digest({"a": [0.1 + 0.2]}) == digest({"a": [0.3]}) != digest({"a": [0.31]})

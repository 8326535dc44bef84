import pickle

from was_fx.schedules.errors import ScheduleError


def test_message_has_headline_every_problem_and_remedy():
    error = ScheduleError("it does not fit", ["first", "second"], "Do this.")
    assert str(error) == "it does not fit:\n  - first\n  - second\nDo this."
    assert error.problems == ["first", "second"]
    assert isinstance(error, ValueError)


def test_message_without_problems_is_headline_and_remedy():
    assert str(ScheduleError("no schedule", remedy="Make one.")) == "no schedule\nMake one."


def test_long_list_is_cut_in_the_message_only():
    error = ScheduleError("broken", [f"problem {number}" for number in range(60)])
    assert "problem 49" in str(error)
    assert "problem 50" not in str(error)
    assert "and 10 more" in str(error)
    assert len(error.problems) == 60


def test_survives_the_way_between_processes():
    error = ScheduleError("broken", ["first"], "Do this.")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problems) == (str(error), error.problems)

import math

import pytest

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.metadata import MetadataReader, is_matrix_shape, plain, to_json


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 3), True),
        ([2, 3], True),
        ((2, 3, 4), False),
        ((0, 3), False),
        ((2, -1), False),
        ((2.0, 3), False),
        ((True, 3), False),
        (None, False),
    ],
)
def test_is_matrix_shape(shape, expected):
    assert is_matrix_shape(shape) == expected


def test_plain_is_what_a_file_gives_back():
    assert plain({"a": (1, 2), 3: "x"}, "field") == {"a": [1, 2], "3": "x"}


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {"nested": [math.nan]}])
def test_values_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ScheduleError, match="'search' cannot be written as JSON"):
        to_json(value, "search")


def test_reader_gives_typed_values():
    reader = MetadataReader({"a": "words", "b": "1.5", "c": '{"x": [2, 3]}', "d": '["p", "q"]', "e": "null"})
    assert reader.text("a") == "words"
    assert reader.value("b", (int, float), 0) == 1.5
    assert reader.shapes("c") == {"x": (2, 3)}
    assert reader.names("d") == ("p", "q")
    assert reader.value("e", (int, type(None)), 4) is None
    reader.finish()
    assert reader.problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "metadata 'key' is missing"),
        ("{", "metadata 'key' is not JSON: '{'"),
        ("NaN", "metadata 'key' is not JSON: 'NaN'"),
        ('{"a": Infinity}', "metadata 'key' is not JSON: '{\"a\": Infinity}'"),
        ('"1"', "metadata 'key' is '\"1\"', expected a value of type int or null"),
        ("true", "metadata 'key' is 'true', expected a value of type int or null"),
        ("1.5", "metadata 'key' is '1.5', expected a value of type int or null"),
    ],
)
def test_reader_notes_what_is_wrong_and_falls_back(text, problem):
    reader = MetadataReader({} if text is None else {"key": text})
    assert reader.value("key", (int, type(None)), 7) == 7
    assert reader.problems == [problem]


def test_reader_gathers_all_problems():
    reader = MetadataReader({"shapes": '{"a": [1], "b": [2, 3]}', "names": "[1]", "other": "x"})
    assert reader.shapes("shapes") == {"b": (2, 3)}
    assert reader.names("names") == ()
    assert reader.text("text") == ""
    reader.finish()
    assert reader.problems == [
        "metadata 'shapes': a has the shape [1], expected [N, K]",
        "metadata 'names' is [1], expected a list of names",
        "metadata 'text' is missing",
        "unknown metadata 'other'",
    ]

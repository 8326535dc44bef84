"""Formats of weights in a few words."""

import pytest

from was_fx.schedules.weight_formats import describe


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({}, "not quantised"),
        ({"lm_head": "int8"}, "int8 (1 Linear)"),
        ({"lm_head": "int8", "a": "int4-32", "b": "int4-32"}, "int4-32 (2 Linears), int8 (1)"),
    ],
)
def test_the_most_frequent_comes_first(formats, words):
    assert describe(formats) == words

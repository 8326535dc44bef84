"""Scales and ticks, words and their differences."""

import pytest

from was_fx.cli.page import svg
from was_fx.cli.page.texts import difference, marked


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (3.71, 3.98, [3.75, 3.8, 3.85, 3.9, 3.95]),
        (0.0011, 0.0052, [0.002, 0.003, 0.004, 0.005]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_scales():
    assert svg.Scale(0, 10, 100, 0)(2.5) == 75
    assert svg.Scale(1, 100, 0, 10, logarithmic=True)(10) == pytest.approx(5)
    assert svg.Scale(3, 3, 0, 10)(3) == 5


def test_a_range_has_room_even_around_one_value():
    assert svg.padded([1, 3], 0.1) == pytest.approx((0.8, 3.2))
    low, high = svg.padded([0.0])
    assert low < 0 < high


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a b c", "a x c", "a <mark>b</mark> c"),
        ("a b c", "a b c", "a b c"),
        ("a b", "a", "a <mark>b</mark>"),
        ("a", "a b", "a"),
        ("", "a", ""),
        ("<i> b", "b", "<mark>&lt;i&gt; b</mark>"),
        ("a\n\nb", "a", "a\n\n<mark>b</mark>"),
    ],
)
def test_marked_words(text, other, expected):
    assert marked(text, other) == expected


def test_how_far_texts_are_the_same():
    assert difference("a b", "a b") == "the dense model's text, word for word"
    assert difference("a b c", "a b d") == "differs from word 3 on"
    assert difference("x", "a") == "differs from word 1 on"

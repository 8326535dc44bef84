"""Stopping candidates early."""

import numpy as np
import pytest

from was_fx.schedules.search.racing import estimate, is_hopeless


@pytest.mark.parametrize(
    ("losses", "incumbent", "hopeless"),
    [
        ([5.0, 5.1, 5.2], [4.0, 4.1, 4.2, 4.0], True),
        ([5.0, 5.1], [4.0, 4.1, 4.2, 4.0], False),  # too few to tell
        ([4.0, 4.1, 4.2], [5.0, 5.1, 5.2, 5.0], False),  # better
        ([4.0, 5.1, 4.0], [4.1, 4.1, 4.2, 4.0], False),  # one bad window
        ([5.0, 5.0, 5.0], [], False),
        ([4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0], False),  # the same
    ],
)
def test_hopeless_is_worse_on_the_windows_seen(losses, incumbent, hopeless):
    assert is_hopeless(losses, incumbent) is hopeless


def test_equals_are_seldom_dropped():
    generator = np.random.default_rng(0)
    dropped = sum(
        is_hopeless((base := generator.normal(4, 0.3, 6)) + generator.normal(0, 0.05, 6), base.tolist())
        for _ in range(1000)
    )
    assert dropped < 25


def test_a_stopped_candidate_is_judged_by_its_difference_to_the_incumbent():
    assert estimate([5.0, 5.0], [4.0, 4.0, 7.0, 7.0]) == pytest.approx(6.5)
    assert estimate([5.0, 6.0], [4.0, 4.0]) == pytest.approx(5.5)
    assert estimate([5.0, 6.0], []) == pytest.approx(5.5)

"""Changes of scores, and how sure they are."""

import math

import pytest

from was_fx.choosing.score_changes import error_key, first_metric, metrics_of, score_change


def results(value, documents=None, error=0.1):
    found = {"alias": "mine", "acc,none": value, "acc_stderr,none": error, "acc_norm,none": 0.5, "sample_len": 4}
    return found if documents is None else {**found, "documents": {"acc,none": documents}}


def test_the_error_is_that_of_the_differences():
    found = score_change(results(0.5, [1.0, 1.0, 0.0, 0.0]), results(0.75, [1.0, 1.0, 1.0, 0.0]), "acc,none")
    assert found.change == -0.25
    assert found.paired
    assert found.error == pytest.approx(0.25)  # of 0, 0, -1, 0
    assert found.errors == pytest.approx(-1.0)


@pytest.mark.parametrize("documents", [None, [1.0], [1.0, 0.0, 0.0]])
def test_other_documents_leave_both_errors(documents):
    found = score_change(results(0.5, documents), results(0.75, [1.0, 0.0]), "acc,none")
    assert not found.paired
    assert found.error == pytest.approx(math.hypot(0.1, 0.1))


@pytest.mark.parametrize("error", [None, "N/A", math.nan])
def test_without_an_error_there_is_none(error):
    found = score_change(results(0.5, error=error), results(0.75), "acc,none")
    assert (found.error, found.errors) == (None, None)


def test_the_same_answers_are_no_change():
    found = score_change(results(0.5, [1.0, 0.0]), results(0.5, [1.0, 0.0]), "acc,none")
    assert (found.change, found.error, found.errors) == (0.0, 0.0, None)


def test_metrics():
    assert metrics_of(results(0.5)) == ["acc,none", "acc_norm,none"]
    assert first_metric(results(0.5)) == "acc_norm,none"
    assert first_metric({"alias": "mine"}) is None
    assert error_key("exact_match,strict-match") == "exact_match_stderr,strict-match"

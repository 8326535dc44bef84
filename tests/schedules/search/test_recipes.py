"""Recipes: the published settings."""

import pytest

from was_fx.schedules.score import Score
from was_fx.schedules.search.recipes import RECIPES, find_recipe


@pytest.mark.parametrize(
    ("name", "score", "inside", "over"),
    [
        ("teal", Score(0.0, 1), "greedy", "uniform"),
        ("wina", Score(1.0, 2), "greedy", "uniform"),
        ("was", Score(1.0, 1), "greedy", "bayesian"),
        ("wisparse", None, "greedy", "evolutionary"),
    ],
)
def test_a_published_recipe_is_its_triple(name, score, inside, over):
    recipe = find_recipe(name)
    assert (recipe.score, recipe.inside, recipe.over) == (score, inside, over)


def test_was_has_its_papers_settings():
    was = RECIPES["was"]
    assert (was.trials, was.margin, was.monotone, was.greedy.step, was.scored) == (50, 0.05, True, 0.025, 0.5)


def test_paper_exact_changes_what_ours_does_differently():
    paper = find_recipe("was", paper_exact=True)
    assert (paper.signed, paper.nearest, paper.recalibrate, paper.margin) == (True, True, False, 0.02)
    assert paper.greedy.shares == {"k_proj": 0.125, "v_proj": 0.125}
    assert find_recipe("teal", paper_exact=True).greedy.shares is None


@pytest.mark.parametrize(
    ("name", "paper_exact", "message"), [("wsa", False, "expected one of"), ("exact", True, "no released code")]
)
def test_what_there_is_not_is_refused(name, paper_exact, message):
    with pytest.raises(ValueError, match=message):
        find_recipe(name, paper_exact=paper_exact)

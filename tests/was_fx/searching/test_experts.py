"""A search gives all experts of a parameter one sparsity, with thresholds of their own."""

import pytest
import torch

import was_fx
from was_fx.coverage.tiny_models import tiny_model
from was_fx.schedules.experts import groups, is_member
from was_fx.schedules.score import Score

SCORES = {"teal": Score(0.0, 1), "was": Score(1.0, 1), "wisparse": Score(0.0, 2), "exact": Score(1.0, 1)}


SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in ("teal", "wisparse")]


@pytest.mark.parametrize("recipe", ["was", "exact", "fisher", *SLOW])
def test_a_recipe_meets_its_budget_by_what_a_token_reads(recipe):
    model, tokens = tiny_model("mixtral"), torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(0))
    fisher = recipe == "fisher"
    calibration = was_fx.calibrate(model, tokens, score=SCORES.get(recipe), fisher=fisher)
    trials = {"was": 3, "wisparse": 3}.get(recipe)
    schedule = was_fx.search(model, calibration, tokens=tokens, target=0.5, recipe=recipe, trials=trials)
    assert schedule.sparsity == pytest.approx(0.5, abs=1e-6)
    assert set(schedule.linears) == set(calibration.shapes)
    experts = {group: names for group, names in groups(schedule.linears).items() if is_member(names[0])}
    assert len(experts) == 4
    for names in experts.values():
        entries = [schedule.linears[name] for name in names]
        # What is one for all of them: with Fisher weights the threshold, else the sparsity.
        assert (len({entry.threshold for entry in entries}) == 1) is fisher
        assert (len({entry.sparsity for entry in entries}) == 1) is not fisher
    was_fx.sparsify(model, schedule)
    assert was_fx.check(model).ok

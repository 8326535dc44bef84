"""Recipes: the published methods as a score, an allocation inside a block and one over blocks.

WINA's rotation of the weights is not part of it here: a schedule lies beside an untouched checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from was_fx.schedules.score import Score
from was_fx.schedules.search.exact import ExactSettings
from was_fx.schedules.search.fisher_correction import FisherSettings
from was_fx.schedules.search.greedy import Greedy

Inside = Literal["uniform", "greedy"]
Over = Literal["uniform", "bayesian", "evolutionary", "random", "exact", "fisher"]

# What WAS's released accounting takes k and v for, whatever the model.
_WAS_SHARES = {"k_proj": 0.125, "v_proj": 0.125}


@dataclass(frozen=True)
class Recipe:
    """How a schedule is found.

    Attributes:
        name: of the recipe.
        score: the score of all Linears; None searches an exponent per Linear (norm 2).
        inside: allocation inside a block.
        over: allocation over blocks; "exact" and "fisher" allocate over all Linears at once and ignore `inside`.
        trials: how many a search over blocks makes.
        margin: how far a block may go from the target, or from the answer that is refined.
        monotone: levels of blocks must not fall over depth.
        greedy: settings of the descent inside a block.
        scored: last share of each sequence's tokens that a block's output error is taken over.
        calibration_tokens: about how many tokens thresholds are measured on.
        exponents: α tried per Linear, when the score is None.
        exact: settings of the exact allocation.
        fisher: settings of the correction of Fisher weights.
        recalibrate: measure the final thresholds on the model as it runs sparsely.
        signed: thresholds by the signed quantile icdf(0.5 + s/2), which assumes symmetric activations.
        nearest: take the row of the greedy table nearest to a level, instead of interpolating to meet the budget.
    """

    name: str
    score: Score | None
    inside: Inside
    over: Over
    trials: int = 0
    margin: float = 0.05
    monotone: bool = False
    greedy: Greedy = field(default_factory=Greedy)
    scored: float = 0.5
    calibration_tokens: int = 20480
    exponents: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    exact: ExactSettings = field(default_factory=ExactSettings)
    fisher: FisherSettings = field(default_factory=FisherSettings)
    recalibrate: bool = True
    signed: bool = False
    nearest: bool = False

    @property
    def searches(self) -> bool:
        """Whether it evaluates trials over blocks."""
        return self.over in ("bayesian", "evolutionary", "random")


RECIPES: Mapping[str, Recipe] = {
    each.name: each
    for each in (
        Recipe("uniform", Score(1.0, 1), "uniform", "uniform"),
        Recipe("teal", Score(0.0, 1), "greedy", "uniform", scored=0.25, greedy=Greedy(step=0.05)),
        Recipe("wina", Score(1.0, 2), "greedy", "uniform", scored=0.25, greedy=Greedy(step=0.05)),
        Recipe("was", Score(1.0, 1), "greedy", "bayesian", trials=50, margin=0.05, monotone=True),
        Recipe("wisparse", None, "greedy", "evolutionary", trials=64, margin=0.15),
        Recipe("exact", Score(1.0, 1), "uniform", "exact"),
        Recipe("fisher", Score(1.0, 1), "uniform", "fisher"),
    )
}


def find_recipe(name: str, *, paper_exact: bool = False) -> Recipe:
    """A recipe by name.

    Args:
        name: one of `RECIPES`.
        paper_exact: as the paper's released code does it where ours differs for a reason: thresholds from signed
            quantiles of the dense model and never measured again, the nearest row of the greedy table, for `was` also
            its bounds of ±0.02 and k and v counted as an eighth of themselves. The budget is then met only nearly.

    Raises:
        ValueError: for another name, or one whose paper released no code.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if not paper_exact:
        return recipe
    if name not in ("teal", "wina", "was"):
        raise ValueError(f"{name} has no released code to repeat exactly; it is there for teal, wina and was")
    recipe = replace(recipe, recalibrate=False, signed=True, nearest=True)
    if name == "was":
        shares = Greedy(recipe.greedy.step, recipe.greedy.limit, _WAS_SHARES)
        recipe = replace(recipe, margin=0.02, greedy=shares)
    return recipe

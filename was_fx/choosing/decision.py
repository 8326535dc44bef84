"""Which of several measured choices to take."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from was_fx.choosing.choices import Choice

# Of the costs of a choice, less is better.
Cost = Callable[[Choice], float]


def cost_bytes(choice: Choice) -> float:
    """Weight bytes that a token reads."""
    return float(choice.bytes_per_token)


def cost_time(choice: Choice) -> float:
    """Milliseconds per token, as the share of the dense model's time in the same turns; infinite if unknown."""
    return math.inf if choice.ratio is None else 1 / choice.ratio


@dataclass(frozen=True)
class Decision:
    """What the measurements speak for.

    Attributes:
        dense: the model as it was loaded, without a schedule.
        choice: the cheapest that is within the limit of perplexity; else, of those cheaper than `dense`, the one with
            the least loss; None if nothing is cheaper.
        fits: the choice is within the limit.
        within: the limit: perplexity may be so much higher than dense, as a share.
    """

    dense: Choice
    choice: Choice | None
    fits: bool
    within: float

    @property
    def rise(self) -> float:
        """How much higher the choice's perplexity is than dense, as a share."""
        return 0.0 if self.choice is None else rise(self.choice, self.dense)


def rise(choice: Choice, dense: Choice) -> float:
    """How much higher a perplexity is than dense, as a share."""
    return math.expm1(choice.loss - dense.loss)


def decide(choices: Sequence[Choice], within: float) -> Decision:
    """The fastest choice within a limit of perplexity, or the one that reads least where speed was not measured.

    Args:
        choices: the first is the model as it was loaded, without a schedule.
        within: how much higher perplexity may be than dense, as a share.
    """
    dense, *others = choices
    cost = cost_bytes if dense.ms_per_token is None else cost_time
    cheaper = [each for each in others if cost(each) < cost(dense)]
    fitting = [each for each in cheaper if rise(each, dense) <= within]
    if fitting:
        return Decision(dense, min(fitting, key=cost), True, within)
    return Decision(dense, min(cheaper, key=lambda each: each.loss, default=None), False, within)


def front(choices: Sequence[Choice], cost: Cost) -> list[Choice]:
    """The choices that no other beats in both cost and loss, from the cheapest on."""
    found: list[Choice] = []
    for each in sorted(choices, key=lambda each: (cost(each), each.loss)):
        if math.isfinite(cost(each)) and (not found or each.loss < found[-1].loss):
            found.append(each)
    return found

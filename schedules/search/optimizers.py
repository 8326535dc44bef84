"""Nevergrad's optimisers by ask and tell: which ones are used, with which settings, and what their own time is."""

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from was_fx.schedules.projection import Vector

OptimizerName = Literal["bayesian", "evolutionary", "random"]


class Optimizer:
    """A seeded optimiser over the box [−1, 1]^d that minimises.

    Args:
        name: "bayesian": a Gaussian process with expected improvement; "evolutionary": CMA-ES; "random": uniform
            samples.
        dimension: d.
        trials: how many values it will be told.
        seed: the same seed and values give the same points.

    Attributes:
        seconds: time spent inside the optimiser.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, name: OptimizerName, dimension: int, trials: int, seed: int) -> None:
        if name not in get_args(OptimizerName):
            raise ValueError(f"the optimizer is {name!r}; expected one of {', '.join(get_args(OptimizerName))}")
        self.seconds = 0.0
        self._optimizer = self._timed(lambda: _make(name, dimension, trials, seed))

    def suggest(self, point: Vector) -> None:
        """Let the next `ask` give this point, [d]."""
        self._timed(lambda: self._optimizer.suggest(np.asarray(point, dtype=np.float64)))

    def ask(self) -> tuple[Any, Vector]:
        """A candidate to be told about, and its point [d]."""
        candidate = self._timed(self._optimizer.ask)
        return candidate, np.asarray(candidate.value, dtype=np.float64)

    def tell(self, candidate: Any, value: float) -> None:
        """The value of an asked candidate."""
        self._timed(lambda: self._optimizer.tell(candidate, value))

    def _timed(self, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with warnings.catch_warnings():
            # Convergence notes of scikit-learn and deprecations between Nevergrad and its dependencies.
            warnings.simplefilter("ignore")
            result = call()
        self.seconds += time.perf_counter() - start
        return result


def _make(name: OptimizerName, dimension: int, trials: int, seed: int) -> Any:
    import nevergrad as ng  # a second to import, and not needed to read schedules

    space = ng.p.Array(shape=(dimension,), lower=-1.0, upper=1.0)
    space.random_state.seed(seed)
    if name == "random":
        return ng.optimizers.RandomSearch(space, budget=trials)
    if name == "evolutionary":
        return ng.optimizers.CMA(space, budget=trials)
    first = max(4, min(2 * dimension, trials // 4))
    settings = {"initialization": "LHS", "init_budget": first, "utility_kind": "ei", "utility_xi": 0.0}
    return ng.optimizers.ParametrizedBO(**settings, gp_parameters={"alpha": 1e-3, "n_restarts_optimizer": 0})(
        space, budget=trials
    )

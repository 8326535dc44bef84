"""Which of Nevergrad's optimisers to search block levels with: best value of 50 trials, and the own time.

    python benchmarks/optimizers.py

The objective is a model of a network: each block's loss rises convexly with its level, blocks differ smoothly over
depth and by chance, and losses interact. Values are shares of the uniform allocation's, means over 5 seeds; each seed
has another network. Every optimiser first tries uniform levels and two ramps.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import nevergrad as ng
import numpy as np

from was_fx.schedules.search.block_space import block_space

TARGET, MARGIN, TRIALS, SEEDS = 0.6, 0.15, 50, 5
BAYESIAN = {"initialization": "LHS", "init_budget": 8, "utility_kind": "ei", "utility_xi": 0.0}
OPTIMIZERS: dict[str, Callable] = {
    "RandomSearch": ng.optimizers.RandomSearch,
    "TwoPointsDE": ng.optimizers.TwoPointsDE,
    "OnePlusOne": ng.optimizers.OnePlusOne,
    "CMA": ng.optimizers.CMA,
    "NGOpt": ng.optimizers.NGOpt,
    "BO": ng.optimizers.BO,
    "BO, LHS and expected improvement": ng.optimizers.ParametrizedBO(**BAYESIAN, gp_parameters={"alpha": 1e-3}),
}


def network(blocks: int, seed: int) -> Callable[[np.ndarray], float]:
    """The loss of block levels [blocks]."""
    generator, depth = np.random.default_rng(seed), np.linspace(0, 1, blocks)
    smooth = 1.2 * np.cos(np.pi * (depth * generator.uniform(0.5, 2) + generator.uniform()))
    costs = np.exp(smooth + 0.5 * generator.normal(size=blocks))
    costs /= costs.sum()

    def loss(levels: np.ndarray) -> float:
        alone = float((costs * levels**3 / (1.02 - levels)).sum())
        return alone + 0.5 * alone**2

    return loss


def run(make: Callable, blocks: int, dimension: int, seed: int) -> tuple[float, float]:
    """Best value as a share of the uniform one's, and seconds inside the optimiser."""
    loss = network(blocks, seed)
    space = block_space([1.0] * blocks, TARGET, MARGIN, dimension=dimension)
    box = ng.p.Array(shape=(space.dimension,), lower=-1, upper=1)
    box.random_state.seed(seed)
    optimizer = make(box, budget=TRIALS)
    uniform, ramp = np.full(blocks, TARGET), 0.5 * MARGIN * np.linspace(-1, 1, blocks)
    for levels in (uniform, uniform + ramp, uniform - ramp):
        optimizer.suggest(space.encode(levels))
    best, seconds = float("inf"), 0.0
    for _ in range(TRIALS):
        start = time.perf_counter()
        candidate = optimizer.ask()
        seconds += time.perf_counter() - start
        value = loss(space.decode(candidate.value))
        best = min(best, value)
        start = time.perf_counter()
        optimizer.tell(candidate, value)
        seconds += time.perf_counter() - start
    return best / loss(uniform), seconds


def main() -> None:
    warnings.simplefilter("ignore")
    print("| blocks | dimensions | optimiser | best / uniform | own seconds |\n|---|---|---|---|---|")
    for blocks, dimensions in ((6, (6,)), (32, (6, 32))):
        for dimension in dimensions:
            for name, make in OPTIMIZERS.items():
                if name.startswith("BO") and dimension > 6:
                    continue  # minutes per run
                found = [run(make, blocks, dimension, seed) for seed in range(SEEDS)]
                best, seconds = (statistics.mean(column) for column in zip(*found, strict=True))
                print(f"| {blocks} | {dimension} | {name} | {best:.3f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()

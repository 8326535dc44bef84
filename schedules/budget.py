"""Model sparsity from the sparsities of Linears."""

import math
from collections.abc import Mapping


def model_sparsity(sparsities: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Mean sparsity weighted by the number of weights: Σ N·K·s / Σ N·K over the Linears in `sparsities`.

    Args:
        sparsities: share of dropped channels, from 0 to 1, of each scheduled Linear by qualified name.
        shapes: (N, K) of at least these Linears.

    Raises:
        ValueError: without a Linear, or if one has no shape.
    """
    unknown = [name for name in sparsities if name not in shapes]
    if unknown:
        raise ValueError(f"no shape was given for {', '.join(unknown)}: give (N, K) for each scheduled Linear")
    weights = {name: shapes[name][0] * shapes[name][1] for name in sparsities}
    total = sum(weights.values())
    if total == 0:
        raise ValueError("model sparsity needs at least one Linear with weights, found none")
    return math.fsum(weights[name] * sparsity for name, sparsity in sparsities.items()) / total

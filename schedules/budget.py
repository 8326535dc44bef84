"""Model sparsity from the sparsities of Linears."""

import math
from collections.abc import Mapping


def model_sparsity(sparsities: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Mean sparsity weighted by the number of weights: Σ N·K·s / Σ N·K over the Linears in `sparsities`.

    Args:
        sparsities: share of dropped channels, from 0 to 1, of each scheduled Linear by qualified name; at least one.
        shapes: (N, K) of at least these Linears.
    """
    weights = {name: shapes[name][0] * shapes[name][1] for name in sparsities}
    return math.fsum(weights[name] * sparsity for name, sparsity in sparsities.items()) / sum(weights.values())

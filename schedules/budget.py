"""Model sparsity from the sparsities of Linears."""

import math
from collections.abc import Mapping

from was_fx.schedules.experts import weights_read


def model_sparsity(
    sparsities: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    experts_per_token: Mapping[str, float] | None = None,
) -> float:
    """Mean sparsity weighted by the number of weights: Σ N·K·s / Σ N·K over the Linears in `sparsities`.

    Matrices of experts count by the share of tokens that an expert gets.

    Args:
        sparsities: share of dropped channels, from 0 to 1, of each scheduled Linear by qualified name; at least one.
        shapes: (N, K) of at least these Linears.
        experts_per_token: how many experts a token is sent to, by group (`was_fx.schedules.experts`).
    """
    weights = weights_read({name: shapes[name] for name in sparsities}, experts_per_token or {})
    return math.fsum(weights[name] * sparsity for name, sparsity in sparsities.items()) / sum(weights.values())

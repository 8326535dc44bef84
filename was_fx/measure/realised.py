"""Realised sparsity: what the sparse Linears of a model drop while it runs, on whichever path it runs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from was_fx.modules.linears import LinearModule, find_linears, weight_bytes_per_token
from was_fx.modules.placement import sum_over_ranks
from was_fx.modules.sparse_linear import SparseLinear
from was_fx.schedules.budget import model_sparsity


@dataclass(frozen=True)
class Realised:
    """What was measured.

    Attributes:
        sparsity: model sparsity over the tokens that were sparse.
        linears: of each scheduled Linear, by qualified name.
        tokens: how many tokens of each were sparse.
        bytes_saved: share of ALL weight bytes of a decode step (the head's included) that a sparse token does not read.
    """

    sparsity: float
    linears: dict[str, float]
    tokens: dict[str, int]
    bytes_saved: float


class Counting:
    """Counts in every sparse Linear of a model, from when it is made until `stop`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._everything = find_linears(model)
        self._linears: dict[str, LinearModule] = {
            name: linear for name, linear in self._everything.items() if isinstance(linear.module, SparseLinear)
        }
        for linear in self._linears.values():
            threshold = linear.module.was_threshold
            linear.module.was_counts = torch.zeros(2, dtype=torch.int64, device=threshold.device)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Begin anew."""
        for linear in self._linears.values():
            linear.module.was_counts.zero_()  # type: ignore[union-attr,operator]

    def stop(self) -> None:
        """Count no longer."""
        for linear in self._linears.values():
            if isinstance(linear.module, SparseLinear):
                linear.module.was_counts = None

    def realised(self) -> Realised:
        """What was counted so far."""
        shares, tokens, saved = {}, {}, 0.0
        for name, linear in self._linears.items():
            counts = sum_over_ranks(linear.module.was_counts, linear)  # type: ignore[arg-type]
            dropped, seen = counts.tolist()
            shares[name] = dropped / seen if seen else 0.0
            tokens[name] = seen // linear.shape[1]
            saved += shares[name] * linear.nbytes
        shapes = {name: self._linears[name].shape for name in shares}
        sparsity = model_sparsity(shares, shapes) if shares else 0.0
        return Realised(
            sparsity, shares, tokens, saved / weight_bytes_per_token(self._model, self._everything.values())
        )


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Counting]:
    """Count while the context lasts."""
    counts = Counting(model)
    try:
        yield counts
    finally:
        counts.stop()

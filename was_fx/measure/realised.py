"""Realised sparsity: what the sparse Linears of a model drop while it runs, on whichever path it runs."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from was_fx.modules.linears import LinearModule, bytes_per_token, find_linears, weight_bytes_per_token
from was_fx.modules.placement import sum_over_ranks
from was_fx.modules.sparse_linear import is_sparse, sparse_threshold


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
            name: linear for name, linear in self._everything.items() if is_sparse(linear)
        }
        self._holders = {(linear.module, _attribute(linear)): linear for linear in self._linears.values()}
        for (module, attribute), linear in self._holders.items():
            device = sparse_threshold(linear).device
            size = (2,) if linear.expert is None else (linear.parameter.shape[0], 2)
            setattr(module, attribute, torch.zeros(size, dtype=torch.int64, device=device))

    def reset(self) -> None:
        """Begin anew."""
        for module, attribute in self._holders:
            getattr(module, attribute).zero_()

    def stop(self) -> None:
        """Count no longer."""
        for (module, attribute), linear in self._holders.items():
            if is_sparse(linear):
                setattr(module, attribute, None)

    def realised(self) -> Realised:
        """What was counted so far."""
        counts = {
            (module, attribute): sum_over_ranks(getattr(module, attribute), linear).tolist()
            for (module, attribute), linear in self._holders.items()
        }
        shares, tokens = {}, {}
        for name, linear in self._linears.items():
            found = counts[linear.module, _attribute(linear)]
            dropped, seen = found if linear.expert is None else found[linear.expert]
            shares[name] = dropped / seen if seen else 0.0
            tokens[name] = seen // linear.shape[1]
        reads = self._reads(tokens)
        sizes = {name: reads[name] * math.prod(self._linears[name].shape) for name in shares}
        skipped = sum(shares[name] * sizes[name] for name in shares)
        saved = sum(shares[name] * reads[name] * self._linears[name].nbytes for name in shares)
        everything = weight_bytes_per_token(self._model, self._everything.values())
        return Realised(skipped / sum(sizes.values()) if shares else 0.0, shares, tokens, saved / everything)

    def _reads(self, tokens: dict[str, int]) -> dict[str, float]:
        """How often a token reads each matrix: a Linear's once, an expert's by the share of tokens that it got."""
        calls = max((tokens[name] for name, linear in self._linears.items() if linear.expert is None), default=0)
        reached = {linear.parameter for name, linear in self._linears.items() if tokens[name]}
        reads = {}
        for name, linear in self._linears.items():
            expected = bytes_per_token(self._model, linear) / linear.nbytes
            known = linear.expert is not None and calls and linear.parameter in reached
            reads[name] = tokens[name] / calls if known else expected
        return reads


def _attribute(linear: LinearModule) -> str:
    return "was_counts" if linear.expert is None else f"was_counts_{linear.held}"


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Counting]:
    """Count while the context lasts."""
    counts = Counting(model)
    try:
        yield counts
    finally:
        counts.stop()

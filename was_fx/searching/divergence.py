"""KL(dense ‖ sparse): how far a model's predictions are off where it drops channels, of many ways to drop at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from was_fx.modules.linears import LinearModule, dropping
from was_fx.modules.placement import input_device
from was_fx.modules.token_rule import dense_length
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.searching.rows import thresholds_by_row, watching_rows
from was_fx.sparse.sparsify import prompts_treated

# Rows of a forward pass, and bytes that their logits may take.
_MOST_ROWS = 32
_LOGITS_BYTES, _LOGITS_BYTES_ELSEWHERE = 4 << 30, 1 << 29


@dataclass(frozen=True)
class Divergence:
    """Of one way of dropping.

    Attributes:
        nats: KL(dense ‖ sparse) in nats per token.
        realised: model sparsity of the tokens that were sparse; experts are not counted.
    """

    nats: float
    realised: float


class DivergenceMeter:
    """Sends a window of tokens through a model, a row for each way of dropping channels, all but its first 1 % sparse.

    Args:
        model: a causal LM, run dense but for what is dropped, also if it is sparsified.
        linears: those that drop, by qualified name.
        norms: g [K] that their thresholds are divided by, by qualified name.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, LinearModule], norms: Mapping[str, Tensor]) -> None:
        self._model, self._linears = model, linears
        self._norms = {name: norm.to(linears[name].parameter.device) for name, norm in norms.items()}
        self._device = input_device(model)
        self._window: Tensor | None = None
        self._dense, self._apart = torch.empty(0), False

    @torch.no_grad()
    def dense(self, window: Tensor) -> Tensor:
        """Log-probabilities [seq, vocabulary] fp32 of the dense model, kept until another window comes.

        Args:
            window: LongTensor [seq].
        """
        if self._window is None or not torch.equal(self._window, window):
            with watching_rows(self._linears, (1, len(window))) as seen:
                self._dense = self._logits(window[None])[0].float().log_softmax(-1)
            self._window, self._apart = window, all(seen)
        return self._dense

    def keeps_rows_apart(self, window: Tensor) -> bool:
        """Whether all Linears see the rows of a batch apart, so that each can drop in its own way; experts don't."""
        self.dense(window)
        return self._apart

    @torch.no_grad()
    def measure(self, window: Tensor, ways: Sequence[Mapping[str, LinearSchedule]]) -> Iterator[Divergence]:
        """The divergence of each way, by entries of the Linears, as soon as it is there.

        Args:
            window: LongTensor [seq].
            ways: an entry for every Linear.
        """
        rows = self._rows(self.dense(window)) if self._apart else 1
        for begin in range(0, len(ways), rows):
            yield from self._measure(window, ways[begin : begin + rows])

    def divergence(self, window: Tensor, logits: Tensor) -> float:
        """Nats per token of other logits [seq, vocabulary] for the window."""
        sparse = logits.float().log_softmax(-1)
        return float(kl_div(sparse, self.dense(window), log_target=True, reduction="sum")) / len(window)

    def _measure(self, window: Tensor, ways: Sequence[Mapping[str, LinearSchedule]]) -> list[Divergence]:
        skipped = dense_length(len(window), "sparse")
        thresholds = {name: thresholds_by_row([way[name] for way in ways], g) for name, g in self._norms.items()}
        lost = torch.zeros(len(ways), dtype=torch.float64, device=self._device)
        plain = {name: linear for name, linear in self._linears.items() if linear.expert is None}

        def add(name: str, weak: Tensor) -> None:
            if name in plain:
                lost.add_(weak.reshape(len(ways), len(window), -1)[:, skipped:].sum((1, 2)), alpha=plain[name].shape[0])

        with dropping(self._linears, thresholds, first=skipped, dropped=add):
            logits = self._logits(window.expand(len(ways), -1))
        size = sum(math.prod(linear.shape) for linear in plain.values()) * (len(window) - skipped)
        each = zip(logits, lost.tolist(), strict=True)
        return [Divergence(self.divergence(window, row), dropped / max(size, 1)) for row, dropped in each]

    def _rows(self, logits: Tensor) -> int:
        """How many rows of such logits there is room for."""
        room = _LOGITS_BYTES if self._device.type == "cuda" else _LOGITS_BYTES_ELSEWHERE
        return max(1, min(_MOST_ROWS, room // (logits.numel() * next(self._model.parameters()).element_size())))

    def _logits(self, rows: Tensor) -> Tensor:
        with prompts_treated(self._model, "dense"):
            logits: Tensor = self._model(input_ids=rows.to(self._device), use_cache=False).logits
        return logits

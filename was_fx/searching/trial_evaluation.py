"""One trial of a search: thresholds into the sparsified model, in place, and text through it."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from was_fx.measure.realised import Counting
from was_fx.modules.linears import LinearModule, dropping, find_linears
from was_fx.modules.token_rule import Prefill, dense_length
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import channel_norms
from was_fx.schedules.search.racing import is_hopeless
from was_fx.searching.rows import thresholds_by_row, watching_rows
from was_fx.sparse.sparsify import prompts_treated, set_entries

# Rows of a forward pass that evaluates several trials, and bytes that their logits may take.
_MOST_ROWS = 32
_LOGITS_BYTES, _LOGITS_BYTES_ELSEWHERE = 4 << 30, 1 << 29


class TrialEvaluator:
    """Measures what entries of a schedule cost, on windows of validation tokens.

    Every trial writes its thresholds into the same sparsified model: nothing is compiled after the first one, and the
    model's fingerprint is not computed again.

    Args:
        model: sparsified, with the Linears and the norm of the trials.
        schedule: the one it was sparsified with.
        tokens: LongTensor [n, seq], the validation windows.
        batch_size: windows per forward pass.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, tokens: Tensor, *, batch_size: int) -> None:
        self._model, self._schedule, self._tokens, self._batch = model, schedule, tokens, batch_size
        self._counts = Counting(model)
        self._device = next(model.parameters()).device
        self._reference: tuple[Tensor, Tensor] | None = None
        self._linears: dict[str, LinearModule] = {}
        self._norms: dict[str, Tensor] = {}
        self._by_rows = False

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluate one trial.

        Args:
            inputs: `linears`: [sparsity, τ, α] by qualified name; and either `incumbent`: the losses of the windows
                to beat, or [], or `window` and `length`: on which window, and how many tokens of it, to measure the
                divergence.

        Returns:
            `tokens`, `seconds`, `realised` (model sparsity), and either `losses`, nats per token of each window,
            fewer than all if the trial is hopeless; or `divergence`, KL(dense ‖ sparse) in nats per token.
        """
        start = time.perf_counter()
        self._set(inputs["linears"])
        result: dict[str, Any]
        if "window" in inputs:
            ids = self._tokens[inputs["window"], : inputs["length"]][None].to(self._device)
            dense = self._dense(ids)
            result = {"divergence": _divergence(self._logits(ids, "sparse")[0], dense), "tokens": ids.numel()}
        else:
            losses = self._losses(inputs["incumbent"])
            result = {"losses": losses, "tokens": len(losses) * self._tokens.shape[1]}
        return {
            **result,
            "realised": self._counts.realised().sparsity,
            "seconds": round(time.perf_counter() - start, 4),
        }

    @torch.no_grad()
    def several(self, trials: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What a call returns for each of these trials.

        Those of a divergence on one window go through the model together, each row of a batch dropping by thresholds
        of its own, unless some Linears don't see the rows apart, as experts don't.
        """
        for window, group in groupby(trials, lambda inputs: (inputs.get("window"), inputs.get("length"))):
            alike, size = list(group), 1
            if None not in window:
                ids = self._tokens[window[0], : window[1]][None].to(self._device)
                dense = self._dense(ids)
                size = self._most_rows(dense) if self._by_rows else 1
            for begin in range(0, len(alike), size):
                part = alike[begin : begin + size]
                yield from self._together(part, ids, dense) if size > 1 else map(self, part)

    def _most_rows(self, logits: Tensor) -> int:
        """How many rows of such logits there is room for."""
        room = _LOGITS_BYTES if self._device.type == "cuda" else _LOGITS_BYTES_ELSEWHERE
        return max(1, min(_MOST_ROWS, room // (logits.numel() * next(self._model.parameters()).element_size())))

    def _together(self, trials: Sequence[Mapping[str, Any]], ids: Tensor, dense: Tensor) -> list[dict[str, Any]]:
        start = time.perf_counter()
        count, skipped = len(trials), dense_length(ids.shape[1], "sparse")
        linears = {name: self._linears[name] for name in trials[0]["linears"]}
        thresholds = {name: self._thresholds(name, [each["linears"][name] for each in trials]) for name in linears}
        lost = torch.zeros(count, dtype=torch.float64, device=self._device)

        def add(name: str, weak: Tensor) -> None:
            lost.add_(weak[:, skipped:].sum((1, 2)), alpha=linears[name].shape[0])

        with dropping(linears, thresholds, first=skipped, dropped=add):
            logits = self._logits(ids.expand(count, -1), "dense")
        size = sum(math.prod(linear.shape) for linear in linears.values()) * (ids.shape[1] - skipped)
        seconds = round((time.perf_counter() - start) / count, 4)
        return [
            {
                "divergence": _divergence(row, dense),
                "tokens": ids.numel(),
                "realised": dropped / size,
                "seconds": seconds,
            }
            for row, dropped in zip(logits, lost.tolist(), strict=True)
        ]

    def _thresholds(self, name: str, rows: Sequence[Sequence[float]]) -> Tensor:
        if name not in self._norms:
            self._norms[name] = channel_norms(self._linears[name].weight, self._schedule.norm)
        return thresholds_by_row([LinearSchedule(*numbers) for numbers in rows], self._norms[name])

    def _dense(self, ids: Tensor) -> Tensor:
        """Log-probabilities [seq, vocabulary] of the dense model; finds out what its Linears see of a batch."""
        if self._reference is None or not torch.equal(self._reference[0], ids):
            everything = find_linears(self._model)
            self._linears = {name: everything[name] for name in self._schedule.linears}
            with watching_rows(self._linears, (1, ids.shape[1])) as seen:
                self._reference = (ids, self._logits(ids, "dense")[0].float().log_softmax(-1))
            self._by_rows = all(seen)
        return self._reference[1]

    def _set(self, linears: Mapping[str, Any]) -> None:
        entries = {name: LinearSchedule(*numbers) for name, numbers in linears.items()}
        set_entries(self._model, self._schedule.replace(entries))
        self._counts.reset()

    def _losses(self, incumbent: list[float]) -> list[float]:
        losses: list[float] = []
        for batch in self._tokens.split(self._batch):
            ids = batch.to(self._device)
            logits = self._logits(ids, "sparse")
            for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):  # one at a time: fp32 logits are large
                losses.append(float(cross_entropy(row.float(), targets)))
            if is_hopeless(losses, incumbent):
                break
        return losses

    def _logits(self, ids: Tensor, prefill: Prefill) -> Tensor:
        with prompts_treated(self._model, prefill):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits


def _divergence(logits: Tensor, dense: Tensor) -> float:
    """KL(dense ‖ sparse), nats per token, of logits and the dense log-probabilities [seq, vocabulary]."""
    sparse = logits.float().log_softmax(-1)
    return float(kl_div(sparse, dense, log_target=True, reduction="sum")) / len(dense)

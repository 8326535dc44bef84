"""One trial of a search: thresholds into the sparsified model, in place, and text through it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from was_fx.measure.realised import Counting
from was_fx.modules.linears import find_linears
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.score import channel_norms
from was_fx.schedules.search.racing import is_hopeless
from was_fx.searching.divergence import DivergenceMeter
from was_fx.sparse.sparsify import prompts_treated, set_entries


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

    @cached_property
    def _meter(self) -> DivergenceMeter:
        everything = find_linears(self._model)
        linears = {name: everything[name] for name in self._schedule.linears}
        norms = {name: channel_norms(linear.weight, self._schedule.norm) for name, linear in linears.items()}
        return DivergenceMeter(self._model, linears, norms)

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
            ids = self._tokens[inputs["window"], : inputs["length"]]
            logits = self._logits(ids[None].to(self._device))[0]
            result = {"divergence": self._meter.divergence(ids, logits), "tokens": len(ids)}
        else:
            losses = self._losses(inputs["incumbent"])
            result = {"losses": losses, "tokens": len(losses) * self._tokens.shape[1]}
        return {
            **result,
            "realised": self._counts.realised().sparsity,
            "seconds": round(time.perf_counter() - start, 4),
        }

    def several(self, trials: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What a call returns for each of these trials.

        Those of a divergence on one window go through the model together where it keeps the rows of a batch apart.
        """
        for window, group in groupby(trials, lambda inputs: (inputs.get("window"), inputs.get("length"))):
            alike = list(group)
            ids = None if None in window else self._tokens[window[0], : window[1]]
            if ids is None or not self._meter.keeps_rows_apart(ids):
                yield from map(self, alike)
                continue
            start = time.perf_counter()
            ways = [{name: LinearSchedule(*numbers) for name, numbers in trial["linears"].items()} for trial in alike]
            for found in self._meter.measure(ids, ways):
                seconds, start = time.perf_counter() - start, time.perf_counter()
                yield {
                    "divergence": found.nats,
                    "tokens": len(ids),
                    "realised": found.realised,
                    "seconds": round(seconds, 4),
                }

    def _set(self, linears: Mapping[str, Any]) -> None:
        entries = {name: LinearSchedule(*numbers) for name, numbers in linears.items()}
        set_entries(self._model, self._schedule.replace(entries))
        self._counts.reset()

    def _losses(self, incumbent: list[float]) -> list[float]:
        losses: list[float] = []
        for batch in self._tokens.split(self._batch):
            ids = batch.to(self._device)
            logits = self._logits(ids)
            for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):  # one at a time: fp32 logits are large
                losses.append(float(cross_entropy(row.float(), targets)))
            if is_hopeless(losses, incumbent):
                break
        return losses

    def _logits(self, ids: Tensor) -> Tensor:
        with prompts_treated(self._model, "sparse"):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

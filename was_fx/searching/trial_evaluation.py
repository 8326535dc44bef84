"""One trial of a search: thresholds into the sparsified model, in place, and text through it."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from was_fx.measure.realised import Counting
from was_fx.modules.token_rule import Prefill
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.search.racing import is_hopeless
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
        self._reference: tuple[Tensor, Tensor] | None = None

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
            result = {"divergence": self._divergence(ids), "tokens": ids.numel()}
        else:
            losses = self._losses(inputs["incumbent"])
            result = {"losses": losses, "tokens": len(losses) * self._tokens.shape[1]}
        return {
            **result,
            "realised": self._counts.realised().sparsity,
            "seconds": round(time.perf_counter() - start, 4),
        }

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

    def _divergence(self, ids: Tensor) -> float:
        if self._reference is None or not torch.equal(self._reference[0], ids):
            self._reference = (ids, self._logits(ids, "dense")[0].float().log_softmax(-1))
        sparse = self._logits(ids, "sparse")[0].float().log_softmax(-1)
        return float(kl_div(sparse, self._reference[1], log_target=True, reduction="sum")) / ids.shape[1]

    def _logits(self, ids: Tensor, prefill: Prefill) -> Tensor:
        with prompts_treated(self._model, prefill):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

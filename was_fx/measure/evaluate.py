"""`evaluate` and `perplexity`: what a schedule costs in loss, and how sparse the model really was."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from was_fx.measure.realised import counting
from was_fx.modules.placement import input_device
from was_fx.modules.token_rule import Prefill
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.progress import Progress, report
from was_fx.sparse.sparsify import prompts_treated
from was_fx.sparse.state import sparse_state


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        loss: mean negative log-likelihood, nats per token, over every token but the first of each sequence.
        tokens: number of tokens scored.
        nominal: the schedule's model sparsity; 0.0 for a dense model.
        realised: model sparsity measured on these tokens, over the tokens that were sparse; 0.0 for a dense model.
        linears: realised sparsity of each scheduled Linear.
        bytes_saved: realised share of ALL weight bytes of a decode step (the head's included) that is not read.
    """

    loss: float
    tokens: int
    nominal: float
    realised: float
    linears: dict[str, float]
    bytes_saved: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    prefill: Prefill = "sparse",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of a dense or sparsified model on non-overlapping sequences, with its realised sparsity.

    The model is called as it is: eager, or compiled if it is compiled.

    Args:
        model: a causal LM; sparsified or not.
        tokens: LongTensor [n, seq] of token ids.
        prefill: which tokens of each sequence are sparse: "sparse" all but the first 1 % (WAS's convention),
            "half" the last half (TEAL's), "all" every one. (Sliding windows, as in TEAL's tables, give another scale.)
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n).

    Raises:
        ValueError, TypeError: as `calibrate` for `tokens`; `prefill` is "dense" for a sparsified model.
    """
    check_tokens(model, tokens)
    state = sparse_state(model)
    if state is not None and prefill == "dense":
        raise ValueError("prefill='dense' would measure the dense model; use 'sparse', 'half' or 'all'")
    with prompts_treated(model, prefill), counting(model) as counts:
        loss, scored = _mean_loss(model, tokens, batch_size, progress)
        found = counts.realised()
    return Evaluation(
        loss=loss,
        tokens=scored,
        nominal=state.schedule.sparsity if state else 0.0,
        realised=found.sparsity,
        linears=found.linears,
        bytes_saved=found.bytes_saved,
    )


def perplexity(model: nn.Module, tokens: Tensor, **arguments) -> float:
    """Perplexity, exp of the mean loss in nats per token; arguments as for `evaluate`."""
    return evaluate(model, tokens, **arguments).perplexity


def _mean_loss(model: nn.Module, tokens: Tensor, batch_size: int, progress: Progress | None) -> tuple[float, int]:
    device = input_device(model)
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for start in range(0, tokens.shape[0], batch_size):
            batch = tokens[start : start + batch_size].to(device=device, dtype=torch.int64)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, targets in zip(logits[:, :-1], batch[:, 1:], strict=True):  # one at a time: fp32 logits are large
                total += torch.nn.functional.cross_entropy(row.float(), targets, reduction="sum")
            report(progress, min(start + batch_size, tokens.shape[0]), tokens.shape[0])
    finally:
        model.train(training)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return float(total) / count, count

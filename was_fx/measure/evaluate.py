"""`evaluate` and `perplexity`: what a schedule costs in loss, and how sparse the model really was."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from was_fx.compat.generation import cache_argument
from was_fx.measure.realised import counting
from was_fx.modules.placement import input_device
from was_fx.modules.token_rule import Prefill, dense_length
from was_fx.modules.tokens import check_tokens
from was_fx.schedules.progress import Progress, report
from was_fx.sparse.sparsify import prompts_treated
from was_fx.sparse.state import sparse_state

# Rows of logits that become fp32 at a time: 250 MB of a vocabulary of 128,000.
_ROWS = 512


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        loss: mean negative log-likelihood, nats per token, over the tokens that were scored.
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
    scored: int | None = None,
    decode: bool = False,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of a dense or sparsified model on sequences, with its realised sparsity.

    The model is called as it is: eager, or compiled if it is compiled. `evaluate_text` cuts a text into sequences by
    the conventions of published tables.

    Args:
        model: a causal LM; sparsified or not.
        tokens: LongTensor [n, seq] of token ids; on the CPU it may be a view of a file that is larger than memory.
        prefill: which tokens of each sequence are sparse: "sparse" all but the first 1 % (WAS's convention),
            "half" the last half (TEAL's), "all" every one.
        scored: how many tokens at the end of each sequence are scored; by default all but the first.
        decode: the sparse tokens go one by one through decode steps with a cache, as when a text is generated; those
            before them are the prompt, which is at least one token. By default all go through at once, as a prompt.
        batch_size: sequences per forward pass.
        progress: called with (sequences done, n); with `decode`, with (tokens done, all).

    Raises:
        ValueError, TypeError: as `calibrate` for `tokens`; `prefill` is "dense" for a sparsified model; `scored` is
            not at least 1 and below seq; the model takes no cache, with `decode`.
    """
    check_tokens(model, tokens)
    state = sparse_state(model)
    if state is not None and prefill == "dense":
        raise ValueError("prefill='dense' would measure the dense model; use 'sparse', 'half' or 'all'")
    if state is not None:
        state.keep_sparse(model)  # before anything is counted
    length = tokens.shape[1]
    if scored is not None and not 1 <= scored < length:
        raise ValueError(f"scored is {scored}; expected at least 1 and less than the {length} tokens of a sequence")
    prompt = max(1, dense_length(length, prefill)) if decode else None
    with prompts_treated(model, "dense" if decode else prefill), counting(model) as counts:
        loss, count = _mean_loss(model, tokens, scored or length - 1, prompt, batch_size, progress)
        found = counts.realised()
    return Evaluation(
        loss=loss,
        tokens=count,
        nominal=state.schedule.sparsity if state else 0.0,
        realised=found.sparsity,
        linears=found.linears,
        bytes_saved=found.bytes_saved,
    )


def perplexity(model: nn.Module, tokens: Tensor, **arguments) -> float:
    """Perplexity, exp of the mean loss in nats per token; arguments as for `evaluate`."""
    return evaluate(model, tokens, **arguments).perplexity


def _mean_loss(
    model: nn.Module, tokens: Tensor, scored: int, prompt: int | None, batch_size: int, progress: Progress | None
) -> tuple[float, int]:
    """Mean loss of the last `scored` tokens of each sequence, and their number.

    Args:
        prompt: with how many tokens of a sequence decoding begins; None: all go through at once.
    """
    device = input_device(model)
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    first = tokens.shape[1] - scored
    done, every = 0, tokens.shape[0] * (1 if prompt is None else tokens.shape[1])
    try:
        for part in tokens.split(batch_size):
            batch = part.to(device=device, dtype=torch.int64)
            for start, logits in _forward(model, batch, prompt):
                skipped = max(0, first - start - 1)  # logits at position i are about token i + 1
                targets = batch[:, start + skipped + 1 : start + logits.shape[1] + 1]
                total += _sum_of_losses(logits[:, skipped:], targets)
                done += len(part) * (1 if prompt is None else logits.shape[1])
                report(progress, done, every)
    finally:
        model.train(training)
    count = tokens.shape[0] * scored
    return float(total) / count, count


def _forward(model: nn.Module, batch: Tensor, prompt: int | None) -> Iterator[tuple[int, Tensor]]:
    """(position of the first, logits [B, n, vocabulary]) of the tokens of a batch, in their order."""
    if prompt is None:
        yield 0, model(input_ids=batch, use_cache=False).logits
        return
    name = cache_argument(model)
    found = model(input_ids=batch[:, :prompt], use_cache=True)
    yield 0, found.logits
    for position in range(prompt, batch.shape[1]):
        found = model(input_ids=batch[:, position : position + 1], use_cache=True, **{name: found[name]})
        yield position, found.logits


def _sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of logits [B, n or n + 1, vocabulary] for tokens [B, n]; those after the last are unused."""
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    for row, wanted in zip(logits[:, : targets.shape[1]].to(targets.device), targets, strict=True):
        for some, answers in zip(row.split(_ROWS), wanted.split(_ROWS), strict=True):
            total += torch.nn.functional.cross_entropy(some.float(), answers, reduction="sum")
    return total

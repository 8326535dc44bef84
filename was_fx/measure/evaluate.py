"""`evaluate` and `perplexity`: what a schedule costs in loss, and how sparse the model really was."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from was_fx.compilation import compile_call
from was_fx.modules.linears import LinearModule, check_tokens, find_linears, weight_bytes_per_token
from was_fx.passes.bindings import Binding, bindings
from was_fx.passes.graph.context import Prefill
from was_fx.schedules.budget import model_sparsity
from was_fx.sparse.placement import input_device, sum_over_ranks
from was_fx.sparse.sparsify import sparse_state

Progress = Callable[[int, int], None]


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
    executor: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of a dense or sparsified model on non-overlapping sequences, with its realised sparsity.

    Args:
        model: a causal LM; sparsified or not.
        tokens: LongTensor [n, seq] of token ids.
        prefill: which tokens of each sequence are sparse: "sparse" all but the first 1 % (WAS's convention),
            "half" the last half (TEAL's), "all" every one. (Sliding windows, as in TEAL's tables, give another scale.)
        batch_size: sequences per forward pass.
        executor: "inductor" or "eager"; by default as the model was sparsified.
        progress: called with (sequences done, n).

    Raises:
        ValueError, TypeError: as `calibrate` for `tokens`; `prefill` is "dense" for a sparsified model.
    """
    check_tokens(model, tokens)
    state = sparse_state(model)
    forward: Callable = model.forward
    observing: contextlib.AbstractContextManager = contextlib.nullcontext()
    if state is not None:
        if prefill == "dense":
            raise ValueError("prefill='dense' would measure the dense model; use 'sparse', 'half' or 'all'")
        options = {"prefill": prefill, "observe": True, "executor": executor or state.options.executor}
        if state.dropping is None:
            forward = compile_call(model.forward, options)
        else:
            forward, observing = model, state.dropping.observing(prefill)
    reset_counts(model)
    with observing:
        loss, count = _mean_loss(model, forward, tokens, batch_size, progress)
    found = realised(model)
    return Evaluation(
        loss=loss,
        tokens=count,
        nominal=state.schedule.sparsity if state else 0.0,
        realised=found.sparsity,
        linears=found.linears,
        bytes_saved=found.bytes_saved,
    )


@dataclass(frozen=True)
class Realised:
    """Sparsity measured while a sparsified model ran under observation; see `Evaluation` for its fields."""

    sparsity: float
    linears: dict[str, float]
    bytes_saved: float


def reset_counts(model: nn.Module) -> None:
    """Forget what `realised` has counted."""
    for binding in _bindings(model, find_linears(model)).values():
        binding.counts.zero_()


def realised(model: nn.Module) -> Realised:
    """What a model realised since `reset_counts`, as far as its calls were compiled to observe."""
    linears = find_linears(model)
    shares, saved = {}, 0.0
    for name, binding in _bindings(model, linears).items():
        dropped, seen = sum_over_ranks(binding.counts, linears[name]).tolist()
        shares[name] = dropped / seen if seen else 0.0
        saved += shares[name] * linears[name].parameter.numel() * linears[name].parameter.element_size()
    shapes = {name: linears[name].shape for name in shares}
    sparsity = model_sparsity(shares, shapes) if shares else 0.0
    return Realised(sparsity, shares, saved / weight_bytes_per_token(model, linears.values()))


def _bindings(model: nn.Module, linears: Mapping[str, LinearModule]) -> dict[str, Binding]:
    state = sparse_state(model)
    if state is not None and state.dropping is not None:
        return state.dropping.bindings
    found = {name: bindings(linear.parameter).get(name) for name, linear in linears.items()}
    return {name: binding for name, binding in found.items() if binding is not None}


def perplexity(model: nn.Module, tokens: Tensor, **arguments) -> float:
    """Perplexity, exp of the mean loss in nats per token; arguments as for `evaluate`."""
    return evaluate(model, tokens, **arguments).perplexity


def _mean_loss(
    model: nn.Module, forward: Callable, tokens: Tensor, batch_size: int, progress: Progress | None
) -> tuple[float, int]:
    device = input_device(model)
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for start in range(0, tokens.shape[0], batch_size):
            batch = tokens[start : start + batch_size].to(device=device, dtype=torch.int64)
            logits = forward(input_ids=batch, use_cache=False).logits
            for row, targets in zip(logits[:, :-1], batch[:, 1:], strict=True):  # one at a time: fp32 logits are large
                total += torch.nn.functional.cross_entropy(row.float(), targets, reduction="sum")
            if progress is not None:
                progress(min(start + batch_size, tokens.shape[0]), tokens.shape[0])
    finally:
        model.train(training)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return float(total) / count, count

"""Fisher weights: how much the loss moves with each input channel of each Linear, by one backward pass.

    g_j² = mean over tokens of (∂L/∂x_j)²,   L = −log p(label), the label drawn from the model's own distribution

The first 1 % of a sequence's tokens don't count: they don't drop channels, and what all others attend to by default has
gradients unlike theirs. Of the others no token counts for more than ten times what 99 % of them do, and no sequence for
more than twice what half of them do: one token that all the rest attends to, or that a norm blows up, would else
outweigh all, and so would one sequence.

∂L/∂x is what reaches the input of this Linear alone, (∂L/∂y) W, siblings apart. Then x_j² g_j² / 2 is the loss, to
second order, that dropping x_j costs by itself.

Where the model drops channels, others that are dropped with it count too, in its own Linear and in those before and
after. `dropped_costs` measures what every channel costs there, by one backward pass of the divergence from the dense
model, whose gradients are bounded alike. They pass a dropped channel as if it were kept: they then say what every
Linear before would have had to give, also through thresholds that it would have crossed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from was_fx.modules.linears import LinearModule, dropping, looking_at_inputs
from was_fx.modules.placement import input_device
from was_fx.modules.token_rule import leading_tokens
from was_fx.modules.tokens import Tokens, batches, holds_more_than_text, number_of_sequences, placed
from was_fx.schedules.blocks import find_blocks
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.experts import FEW_TOKENS, groups, is_member
from was_fx.schedules.files.calibration import Calibration, CalibrationBuilder
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.progress import Progress, report
from was_fx.schedules.score import Score
from was_fx.schedules.search.fisher_correction import DroppedCosts
from was_fx.sparse.sparsify import prompts_treated

# Bytes of activations that a backward pass may keep.
_KEPT = 3 << 30
# Sequences that are all used.
_ALL = 8
# Squared gradients are brought down to so many times what this share of a sequence's tokens have,
_MOST, _OF = 10, 0.99
# and a sequence's to so many times what half of these sequences have, which are kept till then.
_MOST_OF_HALF, _SEQUENCES = 2, 32


def fisher_weights(
    model: nn.Module,
    linears: Mapping[str, LinearModule],
    tokens: Tokens,
    *,
    seed: int = 0,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """g [K] fp32 on the CPU of each Linear, by qualified name.

    No gradient of a weight is taken, and where activations of all blocks would take more than 3 GiB, each block is run
    again for its part of the backward pass, so that memory holds the inputs of the blocks and one block's activations.

    Args:
        model: a dense causal LM, in any floating dtype; its weights may be quantised. Not changed.
        linears: of the model.
        tokens: as for `calibrate`.
        seed: of the labels that are drawn.
        batch_size: sequences per pass.
        progress: called with (sequences done, n).

    Raises:
        ScheduleError: logits or gradients that are not finite.
    """
    sums = {name: _Sum() for name in linears}

    def add(name: str, grad: Tensor) -> None:
        if leading := leading_tokens(grad):
            grad = grad[:, leading:]
        sums[name].add(_bounded(grad.detach().float()).square())

    def watch(name: str, x: Tensor) -> Tensor:
        # One for each Linear, so that siblings don't share a gradient; where nothing before it has one, it starts.
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(partial(add, name))
        return x

    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    with _backward_passes(model, linears), looking_at_inputs(linears, watch):
        for batch, done, total in batches(model, tokens, batch_size):
            logits = _finite(model(**placed(model, batch), use_cache=False).logits)
            logits.backward(_gradient(logits.detach(), generator))
            report(progress, done, total)
    found = {name: (each.total(), each.tokens) for name, each in sums.items() if each.tokens}
    _pool(found, linears)
    problems = [f"{name} has no gradient" for name in linears if name not in found]
    infinite = [name for name, (total, _) in found.items() if not total.isfinite().all()]
    problems += [f"{name}: gradients are NaN or infinite" for name in infinite]
    if problems:
        raise ScheduleError(
            "Fisher weights cannot be measured", problems, "Measure in bf16 or fp32, or leave these Linears out."
        )
    return {name: (total / tokens).sqrt().cpu() for name, (total, tokens) in found.items()}


def _bounded(gradients: Tensor) -> Tensor:
    """Gradients [..., tokens, K], each token's scaled so that the sum of their squares is at most ten times the 99th
    percentile of its sequence's."""
    sizes = gradients.square().sum(-1, keepdim=True)
    most = _MOST * sizes.quantile(_OF, dim=-2, keepdim=True, interpolation="lower")
    return torch.where(sizes > most, gradients * (most / sizes).sqrt(), gradients)


class _Sum:
    """Squared gradients of a Linear's tokens, added up.

    Attributes:
        tokens: how many.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | float = 0.0
        self._means: list[Tensor] = []  # of sequences that are not added yet, [K] each
        self._lengths: list[int] = []

    def add(self, squares: Tensor) -> None:
        """Those of sequences [..., tokens, K], or of rows [rows, K] that belong to no one sequence, as experts see."""
        self.tokens += squares[..., 0].numel()
        if squares.dim() == 2:
            self._total = self._total + squares.sum(0)
            return
        sequences = squares.flatten(0, -3)
        self._means += sequences.mean(1)
        self._lengths += [sequences.shape[1]] * len(sequences)
        if len(self._means) >= _SEQUENCES:
            self._settle()

    def total(self) -> Tensor:
        """The sum [K] over all tokens."""
        if self._means:
            self._settle()
        return torch.as_tensor(self._total)

    def _settle(self) -> None:
        """Add the sequences that wait, none with more than twice the median of their squared gradients per token."""
        means = torch.stack(self._means)
        sizes = means.sum(-1, keepdim=True)
        most = _MOST_OF_HALF * sizes.median(0).values
        means = torch.where(sizes > most, means * (most / sizes), means)
        self._total = self._total + torch.tensor(self._lengths, device=means.device, dtype=means.dtype) @ means
        self._means, self._lengths = [], []


def _pool(sums: dict[str, tuple[Tensor, int]], names: Iterable[str]) -> None:
    """Give the experts that have seen too few tokens the weights of all of their group together."""
    for group in groups(names).values():
        seen = [sums[name] for name in group if name in sums]
        if not is_member(group[0]) or not seen:
            continue
        whole = torch.stack([total for total, _ in seen]).sum(0), sum(tokens for _, tokens in seen)
        for name in group:
            if name not in sums or sums[name][1] < FEW_TOKENS:
                sums[name] = whole


def dropped_costs(
    model: nn.Module,
    linears: Mapping[str, LinearModule],
    schedule: Schedule,
    tokens: Tokens,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, DroppedCosts]:
    """What dropping by a schedule costs, by channel, all but the first 1 % of each sequence's tokens sparse.

    Args:
        model, tokens, batch_size, progress: as for `fisher_weights`.
        linears: of the model.
        schedule: with thresholds of its own for each channel, for all of them.

    Raises:
        ScheduleError: logits that are not finite.
    """
    sums = {name: torch.zeros(3, linear.shape[1], device=linear.parameter.device) for name, linear in linears.items()}
    thresholds = {
        name: schedule.linears[name].channel_thresholds(torch.ones(1, device=each.device))
        for name, each in sums.items()
    }

    def drop(name: str, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        found: Tensor = _Drop.apply(x, thresholds[name], leading_tokens(x), sums[name])
        return found

    count = 0
    with _backward_passes(model, linears):
        for batch, done, total in batches(model, tokens, batch_size):
            given = placed(model, batch)
            with torch.no_grad():
                dense = model(**given, use_cache=False).logits
            with looking_at_inputs(linears, drop):
                logits = _finite(model(**given, use_cache=False).logits)
                # The gradient of KL(dense ‖ sparse), summed over tokens.
                difference = logits.detach().float().softmax(-1).sub_(dense.float().softmax(-1))
                logits.backward(difference.to(logits.dtype))
            count += given["input_ids"].numel()
            report(progress, done, total)
    found = {}
    for name, each in sums.items():
        nats, nats_squared, squares = (each / count).cpu()
        found[name] = DroppedCosts(nats, (nats_squared - nats.square()).clamp_min(0) / count, squares)
    return found


class _Drop(torch.autograd.Function):
    """Drop channels, pass the gradient of all, and add up what each costs.

    What is dropped is saved as autograd saves it, so that it is not kept where blocks are run again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, first: int, sums: Tensor) -> Tensor:
        weak = x.abs() <= threshold
        if first:
            weak[:, :first] = False
        ctx.save_for_backward(x.masked_fill(~weak, 0))
        ctx.sums = sums
        return x.masked_fill(weak, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (dropped,) = ctx.saved_tensors
        lost = dropped.flatten(0, -2).float()
        nats = lost * _bounded(grad.float()).flatten(0, -2)
        ctx.sums[0] -= nats.sum(0)
        ctx.sums[1] += nats.square().sum(0)
        ctx.sums[2] += lost.square().sum(0)
        return grad, None, None, None


@torch.no_grad()
def fisher_table(
    model: nn.Module,
    linears: Mapping[str, LinearModule],
    weights: Mapping[str, Tensor],
    run: Callable[[], object],
    *,
    schedule: Schedule | None = None,
) -> Calibration:
    """The quantiles of |x_j|·g_j of each Linear, dense or while the model drops what a schedule says, but for the first
    1 % of each sequence's tokens.

    Args:
        model, linears: as for `fisher_weights`.
        weights: g by qualified name.
        run: sends the text through the model.
        schedule: with thresholds of its own for each channel.
    """
    builder = CalibrationBuilder(Score(1.0, 1), {name: linear.shape for name, linear in linears.items()}, weights)
    device = input_device(model)
    thresholds = dict.fromkeys(linears)
    if schedule is not None:
        thresholds = {name: schedule.linears[name].channel_thresholds(weights[name].to(device)) for name in linears}
    with dropping(linears, thresholds, first=leading_tokens, look=builder.add):
        run()
    return builder.build(text="", fingerprint={})


def share_of(tokens: Tokens) -> Tokens:
    """The sequences that Fisher weights are measured on: every third, and all of eight or fewer.

    A backward pass, with the blocks run again, costs about three forward passes.
    """
    if number_of_sequences(tokens) <= _ALL or (isinstance(tokens, Mapping) and holds_more_than_text(tokens)):
        return tokens
    return {name: each[::3] for name, each in tokens.items()} if isinstance(tokens, Mapping) else tokens[::3]


def _gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """∂(Σ −log p(label)) / ∂logits = p − onehot, for one label drawn per token."""
    p = logits.float().softmax(-1)
    labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(*p.shape[:-1], 1)
    return p.scatter_add_(-1, labels, p.new_full(labels.shape, -1.0)).to(logits.dtype)


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise ScheduleError(
            "Fisher weights cannot be measured", ["the logits are NaN or infinite"], "Measure in bf16 or fp32."
        )
    return logits


@contextmanager
def _backward_passes(model: nn.Module, linears: Mapping[str, LinearModule]) -> Iterator[None]:
    """The model evaluated densely, with gradients of what goes through it and of no weight, block by block."""
    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(prompts_treated(model, "dense"))
        stack.enter_context(_without_weight_gradients(model))
        stack.enter_context(_blocks_run_again(model, {name: linear.shape for name, linear in linears.items()}))
        yield


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _blocks_run_again(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> Iterator[None]:
    """Of a large batch keep only what enters each block for the backward pass."""
    blocks = [model.get_submodule(block.name) for block in find_blocks(shapes) if block.name not in shapes]
    width = sum(channels for _, channels in shapes.values())
    with ExitStack() as stack:
        for block in blocks:
            own = "forward" in vars(block)
            before = block.forward
            block.forward = partial(_run_block, before, width)
            stack.callback(partial(setattr, block, "forward", before) if own else partial(delattr, block, "forward"))
        yield


def _run_block(forward: Callable[..., Any], width: int, *arguments: Any, **keywords: Any) -> Any:
    """A block's forward; run again for its backward pass, unless so little is to keep of its first argument
    [..., channels]: in all blocks about twice the inputs of their Linears, `width` channels a token."""
    x = arguments[0] if arguments else None
    if isinstance(x, Tensor) and 2 * width * x.shape[:-1].numel() * x.element_size() <= _KEPT:
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

"""How far a block's output is off when its Linears drop channels: what the greedy allocation and the search for
exponents compare."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.modules.linears import dropping, find_linears, looking_at_inputs
from was_fx.schedules.blocks import Block
from was_fx.schedules.experts import group_of, spread
from was_fx.schedules.score import channel_norms, channel_scale
from was_fx.schedules.search.threshold_table import ThresholdTable


class BlockInputs:
    """What each block of a dense model is called with on a few tokens, kept.

    Args:
        model: a dense causal LM.
        blocks: its blocks; one whose name is no module that was called by itself is left out.
        tokens: LongTensor [n, seq]; memory grows with them, n · seq · hidden size per block.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], tokens: Tensor) -> None:
        self._model, self.tokens = model, tokens.numel()
        self._calls: dict[str, tuple[Any, Any]] = {}
        modules = dict(model.named_modules())
        with ExitStack() as stack, torch.no_grad():
            for name in (block.name for block in blocks if block.name in modules and block.name not in block.shapes):
                handle = modules[name].register_forward_pre_hook(partial(self._keep, name), with_kwargs=True)
                stack.callback(handle.remove)
            model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)

    def __contains__(self, block: Block) -> bool:
        return block.name in self._calls

    def _keep(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[name] = (args, kwargs)

    @torch.no_grad()
    def output(self, block: Block) -> Tensor:
        """The block's output, [n, seq, hidden]."""
        args, kwargs = self._calls[block.name]
        result = self._model.get_submodule(block.name)(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


class BlockError:
    """‖y − ŷ‖₂ of a block's output y over the last share of each sequence's tokens, by its Linears' sparsities.

    Args:
        model: the dense model.
        inputs: of its blocks.
        block: the block.
        table: thresholds by sparsity.
        scored: last share of each sequence that counts; the tokens before are dense.

    Attributes:
        calls: block forward passes so far.
    """

    def __init__(
        self, model: nn.Module, inputs: BlockInputs, block: Block, table: ThresholdTable, scored: float
    ) -> None:
        linears = find_linears(model)
        self._inputs, self._block, self._table = inputs, block, table
        self._linears = {name: each for name, each in linears.items() if group_of(name) in block.shapes}
        self._norms = {name: channel_norms(linear.weight, table.norm) for name, linear in self._linears.items()}
        self._dense = inputs.output(block)
        self._first = self._dense.shape[1] - max(1, round(scored * self._dense.shape[1]))
        self.calls = 1

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        """The error with these sparsities of the block's Linears."""
        thresholds = {
            name: self._table.linear(name, sparsity).channel_thresholds(self._norms[name])
            for name, sparsity in spread(sparsities, self._linears).items()
            if sparsity > 0
        }
        self.calls += 1

        with dropping({name: self._linears[name] for name in thresholds}, thresholds, first=self._first):
            difference = self._inputs.output(self._block) - self._dense
        return float(difference[:, self._first :].float().norm())


def linear_errors(
    model: nn.Module,
    inputs: BlockInputs,
    block: Block,
    exponents: Sequence[float],
    norm: int,
    sparsity: float,
) -> dict[str, dict[float, float]]:
    """The error ‖W(x − x̃)‖₂ of each Linear's own output, by exponent, when it drops its lowest scores.

    Args:
        model: the dense model.
        inputs: of its blocks.
        block: the block.
        exponents: α to try.
        norm: p of the channel norms.
        sparsity: share of channels to drop; thresholds are exact quantiles of these inputs.

    Returns:
        By qualified name, or group of experts, and exponent.
    """
    linears = {name: linear for name, linear in find_linears(model).items() if group_of(name) in block.shapes}
    errors: dict[str, dict[float, float]] = {name: {} for name in block.shapes}

    def measure(name: str, x: Tensor) -> None:
        weight = linears[name].weight
        norms = channel_norms(weight, norm)
        x = x.reshape(-1, x.shape[-1])
        for exponent in exponents:
            scores = x.abs().float() * channel_scale(norms, exponent)
            cut = scores.flatten().kthvalue(max(1, round(sparsity * scores.numel()))).values
            off = float((x.masked_fill(scores > cut, 0) @ weight.t()).float().norm())
            own = errors[group_of(name)]
            own[exponent] = math.hypot(own.get(exponent, 0.0), off)

    with looking_at_inputs(linears, measure):
        inputs.output(block)
    return errors

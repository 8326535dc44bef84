"""How far a block's output is off when its Linears drop channels: what the greedy allocation and the search for
exponents compare."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.kernels.parts.private_names import tree_map_only
from was_fx.modules.linears import dropping, find_linears, looking_at_inputs
from was_fx.schedules.blocks import Block
from was_fx.schedules.experts import group_of, spread
from was_fx.schedules.score import channel_norms, channel_scale
from was_fx.schedules.search.threshold_table import ThresholdTable
from was_fx.searching.rows import thresholds_by_row, watching_rows


class BlockInputs:
    """What each block of a dense model is called with on a few tokens, kept.

    Args:
        model: a dense causal LM.
        blocks: its blocks; one whose name is no module that was called by itself is left out.
        tokens: LongTensor [n, seq]; memory grows with them, n · seq · hidden size per block.

    Attributes:
        rows: (n, seq).
        tokens: their number.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], tokens: Tensor) -> None:
        self._model, self.tokens = model, tokens.numel()
        self.rows = (tokens.shape[0], tokens.shape[1])
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
    def output(self, block: Block, copies: int = 1) -> Tensor:
        """The block's output, [copies · n, seq, hidden]: of so many copies of its inputs, one after the other."""
        args, kwargs = tree_map_only(Tensor, partial(self._copied, copies), self._calls[block.name])
        result = self._model.get_submodule(block.name)(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def _copied(self, copies: int, given: Tensor) -> Tensor:
        """A tensor with a row for each sequence, copied; any other as it is."""
        if given.dim() < 2 or given.shape[0] != self.rows[0]:
            return given
        return given.repeat(copies, *(1 for _ in given.shape[1:]))


class BlockErrors:
    """‖y − ŷ‖₂ of a block's output y over the last share of each sequence's tokens, by its Linears' sparsities.

    Sparsities that are asked for together go through the block together, as rows of a batch, where it keeps rows apart.

    Args:
        model: the dense model.
        inputs: of its blocks.
        block: the block.
        table: thresholds by sparsity.
        scored: last share of each sequence that counts; the tokens before are dense.

    Attributes:
        calls: block forward passes so far, those in one batch counted each.
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
        self._by_rows = self._keeps_rows_apart()

    def __call__(self, candidates: Sequence[Mapping[str, float]]) -> list[float]:
        """The error with each of these sparsities of the block's Linears."""
        self.calls += len(candidates)
        if self._by_rows:
            return self._errors(candidates)
        return [error for each in candidates for error in self._errors([each])]

    def _errors(self, candidates: Sequence[Mapping[str, float]]) -> list[float]:
        ways = [spread(each, self._linears) for each in candidates]
        thresholds = {
            name: thresholds_by_row(
                [self._table.linear(name, way[name]) for way in ways], self._norms[name], self._inputs.rows[0]
            )
            for name in self._linears
            if any(way[name] > 0 for way in ways)
        }
        with dropping({name: self._linears[name] for name in thresholds}, thresholds, first=self._first):
            found = self._inputs.output(self._block, len(ways)).unflatten(0, (len(ways), -1)) - self._dense
        return found[:, :, self._first :].float().flatten(1).norm(dim=1).tolist()

    def _keeps_rows_apart(self) -> bool:
        """Whether the block gives copies of its inputs the output of each; tried with two."""
        count, length = self._inputs.rows
        with watching_rows(self._linears, (2 * count, length)) as seen:
            try:
                found = self._inputs.output(self._block, 2)
            except (RuntimeError, ValueError, IndexError, TypeError):
                return False  # something that it is called with has rows of another kind
        both = torch.cat([self._dense, self._dense])
        return all(seen) and found.shape == both.shape and torch.allclose(found, both, rtol=1e-2, atol=1e-2)


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

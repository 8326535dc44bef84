"""A schedule on a model whose weights accelerate keeps in CPU memory or on disk (`device_map="auto"`).

Such a weight is loaded for each call and gone afterwards, and Dynamo can't trace the loading. So nothing is compiled:
each scheduled Linear drops its weak channels by a forward hook. Results are those of the compiled model. Time is not
saved, since whole weights are moved for each token in any case.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from was_fx.kernels.linear.sparse_linear import dropped_channels
from was_fx.modules.linears import LinearModule
from was_fx.passes.bindings import Binding
from was_fx.passes.graph.context import Options, Prefill
from was_fx.schedules.files.schedule import Schedule
from was_fx.sparse.placement import own_channels, whole_channel_norms


class DroppingHooks:
    """The hooks of one model.

    Attributes:
        bindings: by qualified name of each scheduled Linear.
        options: which tokens are sparse, and whether dropped channels are counted; may be replaced.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, LinearModule], schedule: Schedule, options: Options
    ) -> None:
        self.options = options
        self.bindings: dict[str, Binding] = {}
        self._sequences = (1, 1)  # number of sequences, new tokens of each
        for name, linear in linears.items():
            norms = whole_channel_norms(linear, schedule.norm)
            threshold = own_channels(schedule.linears[name].channel_thresholds(norms), linear)
            self.bindings[name] = Binding(name, norms, threshold)
        self._handles = [model.register_forward_pre_hook(self._note_sequences, with_kwargs=True)]
        for name, linear in linears.items():
            self._handles.append(linear.module.register_forward_pre_hook(partial(self._drop, self.bindings[name])))

    def remove(self) -> None:
        """Make the model dense again."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def observing(self, prefill: Prefill) -> Iterator[None]:
        """Count dropped channels, with these tokens of a prompt sparse."""
        before, self.options = self.options, Options(prefill=prefill, observe=True)
        try:
            yield
        finally:
            self.options = before

    def _note_sequences(self, model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = [*args[:1], keywords.get("input_ids"), keywords.get("inputs_embeds")]
        tokens = next((each for each in given if isinstance(each, Tensor)), None)
        if tokens is not None:
            self._sequences = (tokens.shape[0], tokens.shape[1])

    def _drop(self, binding: Binding, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *rest = args
        rows = x.reshape(-1, x.shape[-1])
        count, length = self._sequences
        sparse = self.options.prefill
        if length > 1 and sparse == "dense":
            return None
        dense = 0
        if length > 1 and rows.shape[0] == count * length:  # otherwise only some tokens come this far
            dense = {"sparse": (length + 99) // 100, "half": (length + 1) // 2}.get(sparse, 0)
        if binding.threshold.device != x.device:
            binding.threshold, binding.counts = binding.threshold.to(x.device), binding.counts.to(x.device)
        dropped = dropped_channels(rows, binding.threshold, length, dense)
        if self.options.observe:
            seen = rows.shape[0] - count * dense
            binding.counts[0] += dropped.sum()
            binding.counts[1] += seen * rows.shape[1]
        return rows.masked_fill(dropped, 0).view(x.shape), *rest

"""One step of a generation: some tokens of each sequence through a model with a cache."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from was_fx.compat.generation import CACHE_NAMES

# Arguments of `generate()` that a step hands on.
_KEPT = (*CACHE_NAMES, "use_cache", "logits_to_keep")


class ModelStep:
    """Calls a model for tokens and their positions, and goes past it once it is known how."""

    def __init__(self, model: Any, arguments: Mapping[str, Any], *, call: Any = None, direct: Any = None) -> None:
        """
        Args:
            model: whose step it is.
            arguments: of `generate()`, the cache among them.
            call: calls the model, by keywords; the model itself by default.
            direct: how steps go past the model: a `DirectStep` or `RecordedStep`; None: they don't.
        """
        self._call, self._direct = call or model, direct
        self._arguments = {name: arguments[name] for name in _KEPT if name in arguments}
        takes = inspect.signature(model.forward).parameters
        keywords = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
        self._takes_positions = "position_ids" in takes or keywords

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, S or 1, V] of tokens [B, S] at positions [B, S], the same S at every step."""
        if self._direct is None:
            return self._through_model(tokens, positions)
        changing = [tokens, positions]
        found = self._direct.logits(changing)
        return self._direct.through(self._through_model, changing) if found is None else found

    def _through_model(self, tokens: Tensor, positions: Tensor) -> Tensor:
        own = {"position_ids": positions} if self._takes_positions else {}
        logits: Tensor = self._call(input_ids=tokens, **self._arguments, **own).logits
        return logits


def prompt_logits(model: Any, ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Logits [B, seq or 1, V] of the prompts [B, seq], read with the arguments of `generate()`."""
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **arguments)
    logits: Tensor = model(**inputs, return_dict=True).logits
    return logits


def position_after(ids: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The position [B, 1] of the first new token after the prompts [B, seq]."""
    known = arguments.get("position_ids")
    if known is not None:
        next_one: Tensor = known[:, -1:] + 1
        return next_one
    return torch.full((ids.shape[0], 1), ids.shape[1], device=ids.device)


def runs_callers_code(processor: Any, criteria: Any, streamer: Any) -> bool:
    """Whether code of neither transformers nor ours runs between steps."""
    known = ("transformers.", "was_fx.")
    callbacks = [*(processor or ()), *criteria, *([] if streamer is None else [streamer])]
    return not all(type(each).__module__.startswith(known) for each in callbacks)

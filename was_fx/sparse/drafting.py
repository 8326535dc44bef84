"""`draft`: a sparse copy of a model that shares its weights, to guess tokens that the dense model then checks.

    draft = was_fx.draft(model, schedule)
    model.generate(**inputs, assistant_model=draft)

The text is the dense model's own, for the dense model verifies every token; only its speed depends on the schedule.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compile.options import Lowering
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.progress import Progress, report
from was_fx.sparse import saving
from was_fx.sparse.sparsify import sparsify
from was_fx.sparse.state import sparse_state


def draft(
    model: nn.Module,
    schedule: Schedule | str | Path,
    *,
    tokens: int = 5,
    confidence: float = 0.0,
    lowering: Lowering | None = None,
    allow_other_model: bool = False,
) -> nn.Module:
    """Make a sparse draft of a dense model, for `model.generate(..., assistant_model=draft)`.

    The draft has the same Parameters, not copies of them: it costs a KV cache, and no memory for weights. They move
    into input-major storage, which the dense model reads too, and stop requiring grad. `was_fx.densify(draft)` puts
    everything back.

    Args:
        model: a dense causal LM of transformers; it stays dense.
        schedule: a `Schedule` or the path of one.
        tokens: how many tokens the draft guesses before they are checked.
        confidence: the draft stops guessing earlier at a token with a smaller probability.
        lowering: as for `sparsify`.
        allow_other_model: as for `sparsify`.

    Returns:
        A model of the same class. Its `generation_config` holds `tokens` and `confidence`.

    Raises:
        ValueError: the model is sparsified, so its own text would not be the dense model's; or an argument is out of
            range.
        ScheduleError: the schedule doesn't fit the model.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified, so it can't verify as the dense one: was_fx.densify(model) first")
    if tokens < 1 or not 0 <= confidence < 1:
        raise ValueError(f"tokens is {tokens} and confidence {confidence}; expected at least 1, and 0 ≤ confidence < 1")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    sparse = copy.deepcopy(model, shared)
    sparsify(sparse, schedule, lowering=lowering, allow_other_model=allow_other_model)
    saving.attach(model)  # its weights have moved too
    config: Any = sparse.generation_config
    config.num_assistant_tokens = tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = confidence
    return sparse


@dataclass(frozen=True)
class Acceptance:
    """How well a draft guesses.

    Attributes:
        tokens: tokens generated.
        steps: forward passes of the dense model that made them.
        guessed: tokens that the draft guessed.
        equal: whether the text is the one that the dense model generates alone, greedily.
    """

    tokens: int
    steps: int
    guessed: int
    equal: bool

    @property
    def tokens_per_step(self) -> float:
        """Tokens generated per forward pass of the dense model; 1 without a draft."""
        return self.tokens / self.steps

    @property
    def accepted_per_step(self) -> float:
        """Guessed tokens that the dense model accepted, per forward pass of it; each pass adds a token of its own."""
        return self.tokens_per_step - 1

    @property
    def accepted_share(self) -> float:
        """Share of the guessed tokens that were accepted."""
        return (self.tokens - self.steps) / self.guessed if self.guessed else 0.0


@torch.no_grad()
def acceptance(
    model: nn.Module,
    sparse_draft: nn.Module,
    prompts: Tensor,
    *,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Acceptance:
    """Measure a draft by greedy assisted generation, prompt by prompt.

    Args:
        model: the dense model.
        sparse_draft: of `draft`.
        prompts: LongTensor [n, seq] of token ids, without padding.
        max_new_tokens: tokens per prompt; generation does not stop at an end-of-text token.
        progress: called with (prompts done, n).
    """
    tokens = steps = guessed = 0
    equal = True
    arguments = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
    for done, prompt in enumerate(prompts.to(next(model.parameters()).device).split(1), start=1):
        mask = torch.ones_like(prompt)
        with _noting_lengths(model) as lengths:
            text = model.generate(prompt, attention_mask=mask, assistant_model=sparse_draft, **arguments)  # type: ignore[operator]
        alone = model.generate(prompt, attention_mask=mask, **arguments)  # type: ignore[operator]
        tokens += text.shape[1] - prompt.shape[1]
        steps += len(lengths)
        # A step sees the last accepted token and the guesses; the first one sees the prompt too.
        guessed += sum(lengths) - prompt.shape[1] - (len(lengths) - 1)
        equal = equal and text.equal(alone)
        report(progress, done, len(prompts))
    return Acceptance(tokens, steps, guessed, equal)


@contextmanager
def _noting_lengths(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each forward pass of a model sees, while the context lasts."""
    lengths: list[int] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        lengths.append(ids.shape[1])  # type: ignore[union-attr]

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()

"""`draft`: a sparse copy of a model that shares its weights, to guess tokens that the dense model then checks.

    draft = was_fx.draft(model, schedule)
    model.generate(**inputs, assistant_model=draft)

The text is the dense model's own, for the dense model verifies every token; only its speed depends on the schedule.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.generation import keeps_a_state
from was_fx.compile.options import ModelLowering
from was_fx.generate.drafted_generation import use_drafts
from was_fx.generate.drafted_loop import Round, noting_rounds
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.progress import Progress, report
from was_fx.sparse import saving
from was_fx.sparse.sparsify import sparsify
from was_fx.sparse.state import sparse_state
from was_fx.sparse.weight_plan import Weights


def draft(
    model: nn.Module,
    schedule: Schedule | str | Path,
    *,
    tokens: int = 5,
    confidence: float = 0.0,
    weights: Weights | None = None,
    lowering: ModelLowering | None = None,
    allow_other_model: bool = False,
) -> nn.Module:
    """Make a sparse draft of a dense model, for `model.generate(..., assistant_model=draft)`.

    The draft has the same Parameters, not copies of them, and rows of int8 or int4 that the model has already: it costs
    no memory for weights. Parameters move into input-major storage, which the dense model reads too, and stop requiring
    grad. `was_fx.densify(draft)` puts everything back. With `weights` the draft has quantised ones of its own, and
    shares the others.

    `model.generate` is then fast with the draft: steps of both models run as a sparsified model's do, on one cache.

    Args:
        model: a dense causal LM of transformers; it stays dense.
        schedule: a `Schedule` or the path of one.
        tokens: how many tokens the draft guesses before they are checked.
        confidence: the draft stops guessing earlier after a token with a smaller probability.
        weights: formats of the draft's weights, as for `quantize`; None: those of the model.
        lowering: as for `sparsify`, of both models' steps.
        allow_other_model: as for `sparsify`.

    Returns:
        A model of the same class. Its `generation_config` holds `tokens` and `confidence`.

    Raises:
        ValueError: the model is sparsified, so its own text would not be the dense model's; its cache holds more
            than keys and values, such as a state, so guesses can't be taken back; or an argument is out of range.
        ScheduleError: the schedule doesn't fit the model.
    """
    if sparse_state(model) is not None:
        raise ValueError("the model is sparsified, so it can't verify as the dense one: was_fx.densify(model) first")
    if keeps_a_state(model):
        raise ValueError(
            f"the cache of {type(model).__name__} holds more than keys and values of each token, so guesses can't be "
            "taken back: was_fx.sparsify(model, schedule) instead, which is not lossless"
        )
    if tokens < 1 or not 0 <= confidence < 1:
        raise ValueError(f"tokens is {tokens} and confidence {confidence}; expected at least 1, and 0 ≤ confidence < 1")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    sparse = copy.deepcopy(model, shared)
    sparsify(sparse, schedule, weights=weights, lowering=lowering, allow_other_model=allow_other_model)
    saving.attach(model)  # its weights have moved too
    config: Any = sparse.generation_config
    config.num_assistant_tokens = tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = confidence
    use_drafts(model, sparse)
    return sparse


@dataclass(frozen=True)
class Acceptance:
    """How well a draft guesses.

    Attributes:
        tokens: tokens generated after the first of each prompt, which no draft guesses.
        steps: steps of the dense model that made them.
        guessed: tokens that the draft guessed.
        accepted: those of them that the dense model kept.
        equal: whether the text is the one that the dense model generates alone, greedily.
    """

    tokens: int
    steps: int
    guessed: int
    accepted: int
    equal: bool

    @property
    def tokens_per_step(self) -> float:
        """Tokens generated per step of the dense model; 1 without a draft."""
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def accepted_per_step(self) -> float:
        """Guessed tokens that the dense model accepted, per step of it; each step adds a token of its own."""
        return self.accepted / self.steps if self.steps else 0.0

    @property
    def accepted_share(self) -> float:
        """Share of the guessed tokens that were accepted."""
        return self.accepted / self.guessed if self.guessed else 0.0


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

    Raises:
        ValueError: the draft is another model's, or one that transformers' own loop serves, where nothing is counted.
    """
    tokens = 0
    equal = True
    arguments = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
    rounds: list[Round] = []
    for done, prompt in enumerate(prompts.to(next(model.parameters()).device).split(1), start=1):
        mask = torch.ones_like(prompt)
        with noting_rounds() as found:
            text = model.generate(prompt, attention_mask=mask, assistant_model=sparse_draft, **arguments)  # type: ignore[operator]
        if not found and max_new_tokens > 1:
            raise ValueError(
                f"nothing was counted, for {type(model).__name__} was served by transformers' own loop: either the "
                "draft is not one that was_fx.draft(model, …) made of this very model, or it was made dense since"
            )
        alone = model.generate(prompt, attention_mask=mask, **arguments)  # type: ignore[operator]
        tokens += text.shape[1] - prompt.shape[1] - 1
        rounds += found
        equal = equal and text.equal(alone)
        report(progress, done, len(prompts))
    guessed, accepted = sum(each.guessed for each in rounds), sum(each.accepted for each in rounds)
    return Acceptance(tokens, len(rounds), guessed, accepted, equal)

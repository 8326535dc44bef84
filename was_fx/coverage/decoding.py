"""Logits of given tokens, decoded by a small model after a prompt, and how far two such differ."""

from typing import Any

import torch
from torch import Tensor, nn

from was_fx.coverage.tiny_models import TEXT
from was_fx.measure.sequential import thresholds_of
from was_fx.modules.linears import dropping, find_linears
from was_fx.schedules.files.schedule import Schedule

PROMPT, NEW = 12, 6
TOKENS = torch.randint(3, TEXT, (2, PROMPT + NEW), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, **settings: Any) -> Tensor:
    """Logits [NEW, V] of a prompt's last token and of the given tokens after it, decoded with the model's own cache.

    Args:
        model: of any state.
        settings: further arguments of `generate()`; those of `image_prompt` stand for the prompt.
    """
    prompt = settings.pop("input_ids", TOKENS[:1, :PROMPT])
    forced, length = TOKENS[0, PROMPT:].tolist(), prompt.shape[1]
    settings.setdefault("attention_mask", torch.ones_like(prompt))
    result = model.generate(
        prompt,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        use_cache=True,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda _, ids: [forced[len(ids) - length]],
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.cat(result.logits).float()


def oracle(model: nn.Module, schedule: Schedule, **settings: Any) -> Tensor:
    """Logits of a dense model whose weak channels are zeroed as they come in: what the sparsified one must equal."""
    linears = {name: each for name, each in find_linears(model).items() if name in schedule.linears}
    with dropping(linears, thresholds_of(schedule, linears)):
        return logits(model, **settings)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; infinite where it is not a number."""
    value = float((found - expected).abs().max() / expected.abs().max())
    return value if value == value else float("inf")

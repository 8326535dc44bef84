"""What a sparsified model dropped while it wrote one text."""

import torch
from torch import Tensor

from was_fx.compat.generation import cache_argument
from was_fx.measure.realised import Realised, counting
from was_fx.modules.placement import input_device
from was_fx.sparse.sparsify import prompts_treated
from was_fx.sparse.state import sparse_state

# Tokens that are looked at before an answer and of it, so that this is quick after a long chat too.
MOST = 512


@torch.no_grad()
def answer_sparsity(model: torch.nn.Module, tokens: Tensor, prompt: int, most: int = MOST) -> Realised | None:
    """Realised sparsity of the decode steps that wrote a text.

    Counting in every step would slow down what is timed: here the text is read once more, the prompt densely and the
    answer sparsely with its cache, as when it was written.

    Args:
        model: a causal LM as it was then.
        tokens: LongTensor [1, seq], prompt and answer.
        prompt: how many of them are the prompt, at least 1.
        most: only so many tokens before the answer and of it are read.

    Returns:
        What was dropped; None of a dense model, and where no step was sparse: the first token of an answer comes from
        the prompt, and the last is not read.
    """
    steps = tokens[:, prompt:-1][:, :most].to(input_device(model))
    if sparse_state(model) is None or steps.shape[1] == 0:
        return None
    before = tokens[:, max(0, prompt - most) : prompt].to(steps.device)
    name = cache_argument(model)
    with prompts_treated(model, "dense"):
        found = model(input_ids=before, use_cache=True)
    with prompts_treated(model, "all"), counting(model) as counts:
        model(input_ids=steps, use_cache=True, **{name: found[name]})
        return counts.realised()

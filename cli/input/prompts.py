"""Prompts, and how a model goes on from them."""

import re
import statistics
from dataclasses import dataclass
from typing import Any

from was_fx.cli.input.models import Loaded


def prompt_tokens(loaded: Loaded, prompt: str, max_new_tokens: int) -> Any:
    """The tokens of a prompt, on the model's device.

    Raises:
        ValueError: there are none, or too many for the model with so many new ones.
    """
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    given = inputs["input_ids"].shape[1]
    if given == 0:
        raise ValueError("the prompt has no tokens; give some text")
    if loaded.positions is not None and given + max_new_tokens > loaded.positions:
        raise ValueError(
            f"the prompt has {given} tokens, with --max-new-tokens {max_new_tokens} more than the "
            f"{loaded.positions} that {loaded.name} takes; give a shorter prompt or fewer new tokens"
        )
    return inputs


def beginnings(text: str, count: int = 3, words: int = 16) -> list[str]:
    """The first words of so many paragraphs, spread over a text; of the text itself if it has none so long."""
    long = [each for each in re.split(r"\n\s*\n", text) if len(each.split()) > 2 * words] or [text]
    chosen = [long[(2 * at + 1) * len(long) // (2 * count)] for at in range(count)]
    return list(dict.fromkeys(" ".join(each.split()[:words]) for each in chosen))


def continuation(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float | None = None,
    printer: Any = None,
    draft: Any = None,
) -> dict[str, Any]:
    """Continue a prompt; greedily without a temperature. `printer` is a streamer of transformers, `draft` of
    `was_fx.draft`.

    Returns:
        text (without the prompt), tokens, and ms_per_token: the median step after the first new token. With a draft the
        mean, for tokens come several at once; and accepted_share, of its guesses.
    """
    from was_fx.generate.drafted_loop import noting_rounds

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature}
    if draft is not None:
        sampling["assistant_model"] = draft
    inputs = prompt_tokens(loaded, prompt, max_new_tokens)
    with noting_rounds() as rounds:
        found = written(loaded, inputs, max_new_tokens=max_new_tokens, seed=seed, sampling=sampling, printer=printer)
    result = {"text": found.text, "tokens": len(found.ids), "ms_per_token": found.ms_per_token}
    guessed = sum(each.guessed for each in rounds)
    if guessed:
        result["accepted_share"] = sum(each.accepted for each in rounds) / guessed
    return result


class StoppedError(Exception):
    """Raised by a streamer to end a text where it is."""


@dataclass(frozen=True, eq=False)
class Written:
    """What a model wrote.

    Attributes:
        ids: LongTensor [n], on the CPU.
        text: of them.
        ms_per_token: the median step after the first new token, with a draft the mean; None where there are too few.
        stopped: a streamer ended it.
    """

    ids: Any
    text: str
    ms_per_token: float | None
    stopped: bool


def written(
    loaded: Loaded,
    inputs: Any,
    *,
    max_new_tokens: int,
    seed: int = 0,
    sampling: dict[str, Any],
    printer: Any = None,
) -> Written:
    """What comes after a prompt: `inputs` of a tokenizer [1, seq]. `sampling` are arguments of `generate()`."""
    import torch

    from was_fx.measure.token_clock import TokenClock

    settings = loaded.model.generation_config
    padding = settings.pad_token_id if settings.pad_token_id is not None else loaded.tokenizer.eos_token_id
    clock = TokenClock(printer)
    torch.manual_seed(seed)
    try:
        loaded.model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            streamer=clock,
            **sampling,
        )
        stopped = False
    except StoppedError:
        stopped = True
    ids = torch.cat(clock.tokens) if clock.tokens else torch.empty(0, dtype=torch.long)
    # The first step of a decode compiles.
    steps = clock.steps()[1:]
    text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    average = statistics.fmean if "assistant_model" in sampling else statistics.median
    return Written(ids, text, average(steps) if steps else None, stopped)

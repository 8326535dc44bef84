"""The loop of `generate()` for a dense model with a sparse draft of itself.

    round    the draft decodes some tokens, one by one; the model reads the last token of the text and those guesses in
             one step, and keeps the ones that it would have written itself, and one of its own

Both use one cache. A guess leaves keys and values of the sparse model in it, which the model's step writes over; what
was read in vain is taken back by counting less, for which every layer holds the whole text, one with a sliding window
too. So the draft never reads the prompt, and decodes after the dense model's own keys and values.

Each step has a fixed number of tokens where it is captured or recorded: the model's is filled up with tokens that don't
count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_fx.compat.generation import end_tokens, take_back
from was_fx.generate.greedy import Greedy
from was_fx.generate.model_step import position_after, prompt_logits


@dataclass(frozen=True)
class Round:
    """One step of the dense model after the prompt: how many tokens it was given to check, and how many it kept."""

    guessed: int
    accepted: int


_rounds: ContextVar[list[Round] | None] = ContextVar("rounds of drafted generation", default=None)


@contextmanager
def noting_rounds() -> Iterator[list[Round]]:
    """The rounds of this thread's loops while the context lasts."""
    rounds: list[Round] = []
    token = _rounds.set(rounds)
    try:
        yield rounds
    finally:
        _rounds.reset(token)


@dataclass(frozen=True, eq=False)
class Steps:
    """How the two models are called: (tokens [1, S], positions [1, S]) -> logits [1, S, V].

    Attributes:
        guess: the draft's, of one token.
        verify: the dense model's, of one token more than there may be guesses.
        filled: whether `verify` always takes the same number of tokens.
    """

    guess: Callable[[Tensor, Tensor], Tensor]
    verify: Callable[[Tensor, Tensor], Tensor]
    filled: bool


class DraftedLoop:
    """One text.

    Args:
        model: the dense model.
        ids: LongTensor [1, seq], the prompt.
        processor, criteria, config, streamer: as `generate()` gives them to a decoding method.
        guesses: most tokens of a round that the draft guesses.
        confidence: it guesses no further after a token with a smaller probability.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        processor: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        *,
        guesses: int,
        confidence: float,
    ) -> None:
        self.model, self.processor, self.criteria, self.streamer = model, processor, criteria, streamer
        self.samples: bool = config.do_sample
        self.guesses, self.confidence = guesses, confidence
        self.likeliest = Greedy()
        self.start, self.end = ids.shape[1], config.max_length
        self.length = self.start
        # Room for guesses past the end, and for what a step is filled up with.
        self.text = ids.new_zeros((1, self.end + guesses))
        self.text[:, : self.start] = ids
        known = end_tokens(criteria)
        self.ends = None if known is None else set(known.tolist())

    def run(self, arguments: dict[str, Any], cache: Any, steps: Steps) -> Tensor:
        """LongTensor [1, tokens] of prompt and new tokens. `arguments` are the model's, the cache among them."""
        prompt = self.text[:, : self.start]
        logits = prompt_logits(self.model, prompt, arguments)
        first = position_after(prompt, arguments) - self.start
        # No token that counts stands past the end, where there may be no position.
        self.positions = first + torch.arange(self.text.shape[1], device=prompt.device).clamp(max=self.end - 1)
        over = self._take(self._pick(self._scores(logits[:, -1], self.length))[0])
        while not over:
            guesses = self._guess(steps.guess)
            take_back(cache, len(guesses))
            given = 1 + (self.guesses if steps.filled else len(guesses))
            logits = self._run(steps.verify, self.length - 1, given)
            tokens = self._judge(logits[0, -given:], guesses)
            take_back(cache, given - len(tokens))
            rounds = _rounds.get()
            if rounds is not None:
                rounds.append(Round(len(guesses), len(tokens) - 1))
            over = self._take(tokens)
        if self.streamer is not None:
            self.streamer.end()
        return self.text[:, : self.length].clone()

    def _run(self, step: Callable[[Tensor, Tensor], Tensor], begin: int, count: int) -> Tensor:
        return step(*(_part(each, begin, count) for each in (self.text, self.positions)))

    def _scores(self, logits: Tensor, length: int) -> Tensor:
        """What the token after so many is chosen by, [1, V], of logits [1, V]."""
        if self.processor or self.samples:
            logits = logits.to(torch.float32, copy=True)
        return self.processor(self.text[:, :length], logits) if self.processor else logits

    def _pick(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """A token [1] for scores [1, V], and the probabilities [1, V] that it was drawn by."""
        if not self.samples:
            return self.likeliest(scores), scores
        probabilities = torch.softmax(scores, dim=-1)
        return torch.multinomial(probabilities, num_samples=1).squeeze(1), probabilities

    def _guess(self, step: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Let the draft write tokens behind the text; what it drew each by, [1, V].

        The last token of a text is the dense model's own.
        """
        drawn: list[Tensor] = []
        for length in range(self.length, min(self.length + self.guesses, self.end - 1)):
            scores = self._scores(self._run(step, length - 1, 1)[:, -1], length)
            token, probabilities = self._pick(scores)
            self.text[:, length] = token
            drawn.append(probabilities)
            if self.confidence:
                sure = probabilities if self.samples else torch.softmax(scores.float(), dim=-1)
                if sure[0, token[0]] < self.confidence:
                    break
        return drawn

    def _judge(self, logits: Tensor, drawn: list[Tensor]) -> Tensor:
        """The tokens [n] that the dense model writes after the text: guesses that it keeps, and one of its own.

        Args:
            logits: [S, V], of the last token of the text, of the guesses, and of what came behind.
            drawn: what each guess was drawn by.
        """
        count = len(drawn)
        guesses = self.text[0, self.length : self.length + count]
        if self.processor or self.samples:
            rows = [self._scores(logits[i : i + 1], self.length + i) for i in range(count + 1)]
            scores = torch.cat(rows)
        else:
            scores = logits[: count + 1]
        if not self.samples:
            own = self.likeliest(scores)
            kept = _leading((own[:-1] == guesses).tolist())
            return own[: kept + 1]
        # Algorithm 1 of Leviathan et al., "Fast inference from transformers via speculative decoding": what is kept or
        # drawn instead has the dense model's distribution p, whatever the draft's q.
        p = torch.softmax(scores, dim=-1)
        instead = p[count]
        kept = count
        if drawn:
            q = torch.cat(drawn)
            places = guesses[:, None]
            chance = torch.rand(count, device=p.device)
            kept = _leading((chance * q.gather(1, places)[:, 0] < p[:-1].gather(1, places)[:, 0]).tolist())
            if kept < count:
                rest = (p[kept] - q[kept]).clamp(min=0)
                instead = torch.where(rest.sum() > 0, rest, p[kept])
        return torch.cat([guesses[:kept], torch.multinomial(instead, num_samples=1)])

    def _take(self, tokens: Tensor) -> bool:
        """Put tokens [n] behind the text, up to the first that ends it; whether one does."""
        self.text[0, self.length : self.length + len(tokens)] = tokens
        for token in tokens.tolist():
            self.length += 1
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.ends is None:
                over = bool(self.criteria(self.text[:, : self.length], None).all())
            else:
                over = token in self.ends or self.length >= self.end
            if over:
                return True
        return False


def _leading(kept: list[bool]) -> int:
    """How many are true before the first that isn't."""
    return kept.index(False) if False in kept else len(kept)


def _part(row: Tensor, begin: int, count: int) -> Tensor:
    """Some of [1, n], copied: Dynamo makes inputs of where in a tensor a part begins and how it lies, so no two steps
    would be the same."""
    return row[:, begin : begin + count].clone(memory_format=torch.contiguous_format)

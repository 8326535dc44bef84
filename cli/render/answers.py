"""An answer as it comes, and the line about it."""

import sys
from typing import Any

from transformers import TextStreamer

from was_fx.cli.input.prompts import StoppedError
from was_fx.cli.render.tables import percent
from was_fx.schedules.names import visible


class AnswerPrinter(TextStreamer):
    """A streamer that prints on stdout what a model writes, control characters visibly.

    Attributes:
        stop: set to end the answer with its next token.
    """

    def __init__(self, tokenizer: Any, quiet: bool = False) -> None:
        """`quiet`: print nothing."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = False
        self._quiet = quiet

    def put(self, value: Any) -> None:
        """Called by `generate()` with the prompt, and then with each new token.

        Raises:
            StoppedError: `stop` was set.
        """
        super().put(value)
        if self.stop:
            self.end()
            raise StoppedError

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `TextStreamer` with whole words."""
        if not self._quiet:
            sys.stdout.write(visible(text, keep="\n\t") + ("\n" if stream_end else ""))
            sys.stdout.flush()


def about(tokens: int, tokens_per_second: float | None, sparsity: float | None, variant: str, stopped: bool) -> str:
    """The line below an answer: `24 tokens · 41.2 tokens/s · 48.9 % realised sparsity · sparse, bf16`."""
    parts = [f"{tokens} token{'' if tokens == 1 else 's'}{', stopped' if stopped else ''}"]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.1f} tokens/s")
    if sparsity is not None:
        parts.append(f"{percent(sparsity)} realised sparsity")
    return " · ".join([*parts, variant])

"""`TokenClock`: when each token of a `generate()` arrived."""

import itertools
import time
from typing import Any

from torch import Tensor


class TokenClock:
    """A streamer for `generate()` that notes when each token arrives, and hands them to another streamer.

    Attributes:
        times: seconds, by `time.perf_counter`; the first entry is the prompt, the second the first new token.
        tokens: LongTensors [B] of new tokens, as they came.
    """

    def __init__(self, inner: Any = None) -> None:
        self.times: list[float] = []
        self.tokens: list[Tensor] = []
        self._inner = inner

    def put(self, tokens: Tensor) -> None:
        """Called by `generate()` with the prompt, and then with each new token on the CPU."""
        if self.times:
            self.tokens.append(tokens.clone())  # whose memory may be used again
        self.times.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(tokens)

    def end(self) -> None:
        """Called by `generate()` at the end."""
        if self._inner is not None:
            self._inner.end()

    def steps(self) -> list[float]:
        """Milliseconds of each decode step: from one new token to the next, so that the prompt does not count."""
        arrived = self.times[1:]
        return [1e3 * (after - before) for before, after in itertools.pairwise(arrived)]

"""How published tables score a long text: names for the ways to cut it, to score it and to make it sparse.

    name           sequences                      scored                sparse
    was            blocks of 2048                 all but the first     all but the first 1 %
    teal           windows of 2560, every 512     the last 512          the last half
    all            blocks of 2048                 all but the first     every token
    decode-exact   blocks of 2048                 all but the first     all but the first 1 %, decoded one by one

The first three run prompts, which is much faster than decoding and nearly the same; the last is what they stand for.
`was` and `teal` are different scales: a window of TEAL's has seen 2048 tokens before the first that is scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from was_fx.measure.evaluate import Evaluation, evaluate
from was_fx.modules.token_rule import Prefill
from was_fx.schedules.names import suggestion
from was_fx.schedules.progress import Progress


@dataclass(frozen=True)
class Convention:
    """One way to score a text.

    Attributes:
        length: tokens of a sequence.
        scored: how many at its end are scored, which is also how far the next sequence is; None: all but the first,
            and sequences don't overlap.
        prefill: which tokens are sparse, as for `evaluate`.
        decode: the sparse ones go through decode steps.
    """

    length: int
    scored: int | None
    prefill: Prefill
    decode: bool = False

    def fitted(self, most: int | None) -> "Convention":
        """The same for sequences of at most `most` tokens, in the same proportions."""
        if most is None or most >= self.length:
            return self
        scored = None if self.scored is None else max(1, self.scored * most // self.length)
        return replace(self, length=most, scored=scored)

    def tokens(self, sequences: int) -> int:
        """How many tokens of a text so many sequences are made of."""
        return self.length + (sequences - 1) * (self.scored or self.length)

    def sequences(self, ids: Tensor) -> Tensor:
        """The tokens of a text [n] as sequences [count, length], a view; the rest, which fills none, is left out.

        Raises:
            ValueError: they don't fill one.
        """
        if len(ids) < self.length:
            raise ValueError(f"the text has {len(ids)} tokens, too few for one sequence of {self.length}")
        return ids.unfold(0, self.length, self.scored or self.length)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `evaluate` is given."""
        return {"prefill": self.prefill, "scored": self.scored, "decode": self.decode}


CONVENTIONS: Mapping[str, Convention] = {
    "was": Convention(2048, None, "sparse"),
    "teal": Convention(2560, 512, "half"),
    "all": Convention(2048, None, "all"),
    "decode-exact": Convention(2048, None, "sparse", decode=True),
}


def evaluate_text(
    model: nn.Module,
    ids: Tensor,
    convention: str | Convention = "was",
    *,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss and realised sparsity of a model on a text, by the convention of a published table.

    Args:
        model: a causal LM; sparsified or not.
        ids: LongTensor [n], the whole text.
        convention: "was", "teal", "all" or "decode-exact"; or one of your own.
        limit: at most so many sequences.
        batch_size: sequences per forward pass.
        progress: as for `evaluate`.

    Raises:
        ValueError: there is no such convention, or the text is shorter than one sequence; and as `evaluate`.
    """
    found = convention if isinstance(convention, Convention) else named(convention)
    sequences = found.sequences(ids)[:limit]
    return evaluate(model, sequences, batch_size=batch_size, progress=progress, **found.arguments)


def named(name: str) -> Convention:
    """The convention of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in CONVENTIONS:
        expected = ", ".join(map(repr, CONVENTIONS))
        raise ValueError(f"there is no convention {name!r}{suggestion(name, list(CONVENTIONS))}; expected {expected}")
    return CONVENTIONS[name]

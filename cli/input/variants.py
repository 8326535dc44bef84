"""One model in several variants: dense or sparse, with its weights as they are or quantised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import was_fx
from was_fx.cli.input.files import load_schedule
from was_fx.cli.input.models import DTYPE_NAMES, Loaded, load_model, lowering_name
from was_fx.cli.input.options import Dtype, Lowering
from was_fx.cli.input.weights import parse_formats, parse_weights, quantise

# What the weights of a checkpoint as they are go by.
AS_SAVED = "full"


@dataclass(frozen=True)
class Variant:
    """Attributes:
    weights: a format such as int8, or `AS_SAVED`.
    sparse: it decodes by the schedule.
    """

    weights: str
    sparse: bool


class Variants:
    """The model in each format that was asked for, loaded once and kept; one of them is in use.

    Attributes:
        now: the variant in use.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        weights: str = AS_SAVED,
        schedule: Any = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            load: the model as it was saved.
            weights: the format to begin with, or several as `parse_formats` takes them.
            schedule: what is sparse; by default what the model was saved with, if it was.
            settings: of `sparsify`.
        """
        self._load, self.schedule = load, schedule
        self._settings: dict[str, Any] = dict(settings or {})
        self._loaded: dict[str, Loaded] = {}
        self._add(weights)
        self.now = Variant(weights, self.schedule is not None)
        self._settle()

    @property
    def loaded(self) -> Loaded:
        """The model in use."""
        return self._loaded[self.now.weights]

    def use(self, weights: str | None = None, sparse: bool | None = None) -> bool:
        """Take other weights, or decode densely or sparsely; what is not given stays.

        Returns:
            Whether weights were loaded for it.

        Raises:
            ValueError, OSError: there is no schedule, or weights can't be loaded so. All stays as it was.
        """
        wanted = Variant(weights or self.now.weights, self.now.sparse if sparse is None else sparse)
        if wanted.sparse and self.schedule is None:
            raise ValueError("there is no schedule to be sparse by; start with --schedule FILE")
        new = wanted.weights not in self._loaded
        if new:
            self._add(wanted.weights)
        before, self.now = self.now, wanted
        try:
            self._settle()
        except BaseException:
            self.now = before
            raise
        return new

    def name(self, variant: Variant | None = None) -> str:
        """A variant in words: `sparse, int8`."""
        variant = variant or self.now
        return f"{'sparse' if variant.sparse else 'dense'}, {self._format(variant.weights)}"

    def megabytes(self) -> dict[str, float]:
        """What the weights in memory take, by format."""
        return {
            self._format(weights): loaded.model.get_memory_footprint() / 1e6 for weights, loaded in self._loaded.items()
        }

    def _format(self, weights: str) -> str:
        if weights != AS_SAVED:
            return weights
        loaded = self._loaded[weights]
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        return loaded.weights or DTYPE_NAMES.get(dtype, dtype)

    def _add(self, weights: str) -> None:
        from was_fx.sparse.state import sparse_state

        loaded = self._load()
        saved = sparse_state(loaded.model)
        if saved is not None:
            if self.schedule is None:
                self.schedule, self._settings["prefill"] = saved.schedule, saved.rule.prefill
            was_fx.densify(loaded.model)
        if weights != AS_SAVED:
            quantise(loaded.model, loaded.name, parse_formats([weights])[weights])
        self._loaded[weights] = loaded

    def _settle(self) -> None:
        """Put the schedule on the model in use, or take it off."""
        if self.now.sparse:
            was_fx.sparsify(self.loaded.model, self.schedule, **self._settings)
        else:
            was_fx.densify(self.loaded.model)


def load_variants(
    model: str,
    schedule: Path | None,
    *,
    weights: Sequence[str] | None,
    dtype: Dtype,
    device: str,
    lowering: Lowering | None,
    allow_other_model: bool,
) -> Variants:
    """What the options of a command stand for; nothing is loaded before they are checked.

    Raises:
        ValueError, OSError: as `load_schedule`, `lowering_name` and `load_model`.
        typer.BadParameter: as `parse_weights`.
    """
    parse_weights(weights)
    decoding = lowering_name(lowering, device)
    found = load_schedule(schedule) if schedule else None
    return Variants(
        lambda: load_model(model, dtype, device, keep_schedule=True),
        ",".join(weights) if weights else AS_SAVED,
        found,
        {"lowering": decoding, "allow_other_model": allow_other_model},
    )

"""What a sparsified model remembers, and which model it is."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from was_fx.modules.freshness import Freshness
from was_fx.modules.linears import LinearModule
from was_fx.modules.quantized_linear import weight_formats
from was_fx.modules.text_decoder import TextDecoder
from was_fx.modules.token_rule import TokenRule
from was_fx.modules.weights import is_offloaded, is_sharded
from was_fx.schedules.files.fingerprint import fingerprint, fingerprint_without_weights
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.weight_formats import describe


@dataclass(eq=False)
class SparseState:
    """What `sparsify` keeps of a model: `model._was_state`.

    Attributes:
        schedule: the schedule in force.
        rule: which tokens are sparse.
        freshness: looks after weights that change.
        handles: of the hooks on the model.
        strides: by qualified name of a Linear, its weight's (this rank's part's) before it was moved.
    """

    schedule: Schedule
    rule: TokenRule
    freshness: Freshness
    handles: list[Any] = field(default_factory=list)
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)


def sparse_state(model: nn.Module) -> SparseState | None:
    """What `sparsify` left on `model`; None for a dense model."""
    return getattr(model, "_was_state", None)


def model_fingerprint(model: nn.Module, linears: Mapping[str, LinearModule], architecture: str = "") -> dict:
    """The fingerprint of a model: architecture, and shapes and a sample of the weights of all its Linears; of a
    multimodal model, of those of its text decoder and its head. Without the sample where weights are offloaded, sharded
    or quantised, so that a schedule fits a model in any format.

    Args:
        model: any model.
        linears: all of its Linears, by the names that stand in the fingerprint.
        architecture: the name of the class, by default the model's.
    """
    decoder, architecture = TextDecoder(model), architecture or type(model).__name__
    linears = {name: each for name, each in linears.items() if each.head or decoder.holds(each.name)}
    if any(is_offloaded(each.parameter) or is_sharded(each.parameter) or each.rows for each in linears.values()):
        return fingerprint_without_weights(architecture, {name: each.shape for name, each in linears.items()})
    return fingerprint(architecture, {name: linear.weight for name, linear in linears.items()})


def warn_of_other_formats(model: nn.Module, made_with: Mapping[str, str] | None, what: str) -> None:
    """Warn the caller's caller where thresholds were measured with weights in other formats than the model's.

    Args:
        model: that they are used with.
        made_with: formats by qualified name; None if they are not known.
        what: "the schedule" or "the calibration".
    """
    found = weight_formats(model)
    if made_with is not None and made_with != found:
        warnings.warn(
            f"{what} was made with weights {describe(made_with)}, and those of the model are {describe(found)}; its "
            "thresholds fit less well than ones that are measured on this model",
            stacklevel=3,
        )

"""What a sparsified model remembers, and which model it is."""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from was_fx.kernels.parts.private_names import is_transforming
from was_fx.modules.freshness import Freshness
from was_fx.modules.linears import LinearModule, find_linears, plain_name
from was_fx.modules.quantized_linear import weight_formats
from was_fx.modules.sparse_linear import is_sparse, sparse_modules
from was_fx.modules.text_decoder import TextDecoder
from was_fx.modules.token_rule import TokenRule, body_of, prompt_begins
from was_fx.modules.weights import is_offloaded, is_sharded
from was_fx.schedules.experts import module_of
from was_fx.schedules.files.fingerprint import fingerprint, fingerprint_without_weights
from was_fx.schedules.files.schedule import Schedule
from was_fx.schedules.weight_formats import describe
from was_fx.sparse.in_place import Strides, make_all_sparse


@dataclass(eq=False)
class SparseState:
    """What `sparsify` keeps of a model: `model._was_state`.

    Attributes:
        schedule: the schedule in force.
        rule: which tokens are sparse.
        freshness: looks after weights that change.
        handles: of the hooks on the model.
        strides: by qualified name of a Linear, its weight's (this rank's part's) before it was moved.
        body: qualified name of the model's body.
        gone: qualified names of scheduled modules that are not in the model any more.
    """

    schedule: Schedule
    rule: TokenRule
    freshness: Freshness
    handles: list[Any] = field(default_factory=list)
    strides: Strides = field(default_factory=dict)
    body: str = ""
    gone: set[str] = field(default_factory=set)

    def watch(self, model: nn.Module) -> None:
        """Decide before every call which tokens are sparse, and before every prompt look for modules that were replaced
        and weights that were changed."""
        body = body_of(model)
        self.handles = [*self.rule.watch(model), model.register_forward_pre_hook(self.before_model)]
        if body is not None:
            self.body = next(name for name, module in model.named_modules() if module is body)
            self.handles.append(body.register_forward_pre_hook(self.before_body))
        self.handles += self.freshness.watch(model)

    def before_model(self, model: nn.Module, _: Any) -> None:
        """Hook: look at a prompt."""
        self._before("model", model)

    def before_body(self, body: nn.Module, _: Any) -> None:
        """Hook: look at a prompt of the body alone."""
        self._before("body", body, f"{self.body}.")

    def _before(self, role: Literal["model", "body"], module: nn.Module, prefix: str = "") -> None:
        if torch.compiler.is_compiling() or not prompt_begins(role):
            return
        self.keep_sparse(module, prefix)
        if not is_transforming():  # a transform's weights are for one call only, and have no address
            self.freshness.refresh(module)

    def keep_sparse(self, module: nn.Module, prefix: str = "") -> None:
        """Make sparse what was put in the place of scheduled Linears since `sparsify`.

        Args:
            module: the model, or a part of it.
            prefix: what stands before the names of the part's modules in the model.

        Warns:
            UserWarning: once of each that can't be.
        """
        present = {prefix + plain_name(name) for name in sparse_modules(module)}
        missing = {each for each in self._modules - present - self.gone if each.startswith(prefix)}
        if not missing:
            return
        self.gone |= missing
        linears = {prefix + name: linear for name, linear in find_linears(module).items()}
        found = {prefix + plain_name(name): each for name, each in module.named_modules()}
        new = {}
        for name in self.schedule.linears:
            linear, holder = linears.get(name), module_of(name)
            if holder not in missing or holder not in found or (linear is not None and is_sparse(linear)):
                continue
            channels = self.schedule.shapes[name][1]
            if linear is not None and linear.shape[1] == channels:
                new[name] = linear
                continue
            kind = type(found[holder]).__name__ if linear is None else f"a Linear {list(linear.shape)}"
            warnings.warn(
                f"{name} was replaced by {kind}, which stays dense: the schedule is for a Linear of {channels} input "
                "channels; calibrate the model as it is now",
                stacklevel=3,
            )
        self.strides = make_all_sparse(new, self.schedule, self.rule) | self.strides
        self.gone -= {module_of(name) for name in new}

    @functools.cached_property
    def _modules(self) -> set[str]:
        """Qualified names of the modules that hold scheduled Linears."""
        return {module_of(name) for name in self.schedule.linears}


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

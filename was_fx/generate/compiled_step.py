"""The call of a model's decode step, compiled with the backend "was" where that can be done."""

import logging
from typing import Any

import torch

from was_fx.compat.dynamo import call_of, settings_for_models, unsupported_errors
from was_fx.compile.backend import register, was

log = logging.getLogger(__name__)


class CompiledStep:
    """`model(...)`, as one graph. Where Dynamo can't make one, the model's modules run as they are from then on.

    Attributes:
        declined: why nothing is compiled; "" while it is.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        register()
        self.declined = ""
        self._model = model
        # fullgraph: a graph break would cost more than it saves; dynamic: one graph for every length of the cache.
        self._compiled: Any = torch.compile(model.__call__, backend=was, dynamic=True, fullgraph=True, options=options)

    def __call__(self, **arguments: Any) -> Any:
        """The model's output for one step."""
        if not self.declined:
            try:
                with settings_for_models():
                    return self._compiled(**arguments)
            except unsupported_errors() as error:
                self.declined = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                log.warning("decode steps run uncompiled, and slower, because %s", self.declined)
        return self._model(**arguments)


class CompiledModel:
    """Every call of a model, compiled; in parts, where it can't be one graph. Takes the place of what
    `torch.nn.Module.compile` sets, for under the settings of `settings_for_models` hooks are honoured that come later.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        register()
        self._call = call_of(model)
        self._compiled: Any = torch.compile(self._call, backend=was, dynamic=True, options=options)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The model's output."""
        if torch.compiler.is_compiling():  # by someone else, who traces the model itself
            return self._call(*arguments, **keywords)
        with settings_for_models():
            return self._compiled(*arguments, **keywords)

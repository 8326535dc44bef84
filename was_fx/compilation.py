"""How this package calls torch.compile: the settings of Dynamo that a sparsified model needs, in one place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from was_fx.backend import raise_recompile_limit, was


def compile_call(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile `function`, a model's call or forward, with the backend "was".

    Args:
        function: a bound method of a model.
        options: of the backend "was".

    Returns:
        A callable of the same arguments. Inside another torch.compile it is `function` itself.
    """
    import torch._dynamo

    raise_recompile_limit()
    # fullgraph: a graph break or an exhausted recompile limit must raise, not silently run dense.
    # dynamic: one graph for every prompt length, one for every cache length.
    compiled = torch.compile(function, backend=was, dynamic=True, fullgraph=True, options=dict(options))
    # Otherwise dynamic=True makes an input of every float, and Inductor turns it down after a first compilation.
    settings = torch._dynamo.config.patch(specialize_float=True)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **keywords)
        with settings:
            return compiled(*arguments, **keywords)

    return call

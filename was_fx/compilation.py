"""How this package calls torch.compile: the settings of Dynamo that a sparsified model needs, in one place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from was_fx.compile.backend import raise_recompile_limit, was
from was_fx.untraceable_cache import hide_updates


def compile_call(
    function: Callable[..., Any], options: Mapping[str, Any], *, prompts_as_they_are: bool = False
) -> Callable[..., Any]:
    """Compile `function`, a model's call or forward, with the backend "was": as one graph, or in parts, cut where a
    cache is updated that can't be traced.

    Args:
        function: a bound method of a model.
        options: of the backend "was".
        prompts_as_they_are: run calls of more than one token per sequence without compiling them. On a GPU, a traced
            prompt would lose its fast causal attention, and a compiled one costs as long to compile as a decode step.

    Returns:
        A callable of the same arguments. Inside a torch.compile with the backend "was" it is `function` itself, to
        be traced with the options given there. Inside one with another backend, such as the one that transformers'
        `generate()` starts on a GPU with a static cache, it stays out of the graph and runs as ever: traced there,
        the model would be dense.
    """
    import torch._dynamo

    raise_recompile_limit()
    # fullgraph: a graph break or an exhausted recompile limit must raise, not silently run dense.
    # dynamic: one graph for every prompt length, one for every cache length.
    compiled = torch.compile(function, backend=was, dynamic=True, fullgraph=True, options=dict(options))
    in_parts = torch.compile(function, backend=was, dynamic=True, options=dict(options))
    # Otherwise dynamic=True makes an input of every float, and Inductor turns it down after a first compilation.
    settings = torch._dynamo.config.patch(specialize_float=True)
    # Past the limit of recompilations parts would run dense; Dynamo must raise instead.
    settings_in_parts = torch._dynamo.config.patch(
        specialize_float=True,
        fail_on_recompile_limit_hit=True,
        recompile_limit=1024,  # some graphs are made for each block
        accumulated_recompile_limit=8192,
    )

    def run(*arguments: Any, **keywords: Any) -> Any:
        if prompts_as_they_are and _tokens(arguments, keywords) > 1:
            return function(*arguments, **keywords)
        if hide_updates(keywords.get("past_key_values")):
            with settings_in_parts:
                return in_parts(*arguments, **keywords)
        with settings:
            return compiled(*arguments, **keywords)

    hidden = torch.compiler.disable(run)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not torch.compiler.is_compiling():
            return run(*arguments, **keywords)
        if _traced_for_was():
            return function(*arguments, **keywords)
        return hidden(*arguments, **keywords)

    return call


def _tokens(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """Tokens per sequence of a call; 1 when it can't be told."""
    given = [keywords.get("input_ids"), *arguments[:1], keywords.get("inputs_embeds")]
    first = next((each for each in given if isinstance(each, torch.Tensor)), None)
    return 1 if first is None or first.dim() < 2 else first.shape[1]


@torch.compiler.assume_constant_result
def _traced_for_was() -> bool:
    """While Dynamo traces: whether it does so for the backend "was"."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_fn", backend) is was

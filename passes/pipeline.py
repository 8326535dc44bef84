"""The passes, in order."""

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch.fx import GraphModule

from was_fx.passes.count_dropped import count_dropped
from was_fx.passes.extra_inputs import own_copy
from was_fx.passes.graph.choose_phase import choose_phase
from was_fx.passes.graph.context import Context, Options
from was_fx.passes.graph.errors import RewriteError
from was_fx.passes.graph.recognize_linears import recognize_linears
from was_fx.passes.merge_siblings import merge_siblings
from was_fx.passes.sparsify_linears import sparsify_linears

log = logging.getLogger(__name__)


def _gpu_passes() -> tuple[Callable[[Context], None], ...]:
    """The passes that put Triton's kernels in place; none where Triton can't be installed."""
    if find_spec("triton") is None:
        return ()
    from was_fx.passes.batch_counters import batch_counters
    from was_fx.passes.fuse_attention import fuse_attention
    from was_fx.passes.fuse_gated_products import fuse_gated_products
    from was_fx.passes.fuse_rms_norms import fuse_rms_norms
    from was_fx.passes.list_channels import list_channels

    return list_channels, fuse_attention, fuse_rms_norms, fuse_gated_products, batch_counters


# The phase comes before the rewrite, so that the graph of a dense prompt is never touched.
PIPELINE: tuple[Callable[[Context], None], ...] = (
    recognize_linears,
    choose_phase,
    sparsify_linears,
    count_dropped,
    merge_siblings,
    *_gpu_passes(),
)

# Each is called with the context of every graph, once it is rewritten: for reports.
observers: list[Callable[[Context], None]] = []

_REQUIRED = {"recognize_linears", "choose_phase"}


def run(module: GraphModule, inputs: Sequence[Any], options: Options) -> Context:
    """Run the passes over a copy of Dynamo's graph.

    Args:
        module: Dynamo's graph module; it is not changed.
        inputs: one example per graph input, weights as the Parameters themselves.
        options: what the passes may do.

    Returns:
        The context: the rewritten module, the inputs it needs beyond Dynamo's, and what was done.

    Raises:
        RewriteError: a scheduled Linear can't be made sparse; names it.
        ValueError: `options.disable` names no pass, or one that can't be left out.
    """
    names = [each.__name__ for each in PIPELINE]
    optional = [name for name in names if name not in _REQUIRED]
    unknown = sorted(set(options.disable) - set(optional))
    if unknown:
        raise ValueError(f"disable names {', '.join(unknown)}; the passes to choose from are {', '.join(optional)}")
    context = Context(own_copy(module), list(inputs), options)
    for each in PIPELINE:
        if each.__name__ not in options.disable:
            each(context)
    context.module.graph.lint()
    context.module.recompile()
    log.info("passes: %s", dict(context.counts))
    for observer in observers:
        observer(context)
    return context


__all__ = ["PIPELINE", "Context", "Options", "RewriteError", "observers", "run"]

"""The passes, in order."""

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch.fx import GraphModule

from was_fx.passes.find_sparse_calls import find_sparse_calls
from was_fx.passes.graph.context import Context, Options
from was_fx.passes.insert import insert
from was_fx.passes.merge_siblings import merge_siblings

log = logging.getLogger(__name__)

Pass = Callable[[Context], None]


def _gpu_passes() -> tuple[Pass, ...]:
    """The passes that put Triton's kernels in place; none where Triton can't be installed."""
    if find_spec("triton") is None:
        return ()
    from was_fx.passes.batch_counters import batch_counters
    from was_fx.passes.fuse_attention import fuse_attention
    from was_fx.passes.fuse_gated_products import fuse_gated_products
    from was_fx.passes.fuse_rms_norms import fuse_rms_norms
    from was_fx.passes.fuse_routers import fuse_routers
    from was_fx.passes.list_channels import list_channels
    from was_fx.passes.list_expert_channels import list_expert_channels
    from was_fx.passes.replace_topk import replace_topk

    return (
        list_channels,
        list_expert_channels,
        fuse_routers,
        replace_topk,
        fuse_attention,
        fuse_rms_norms,
        fuse_gated_products,
        batch_counters,
    )


# What gives a graph its sparse Linears, and what only makes them fast: any of these may be left out.
REQUIRED: tuple[Pass, ...] = (insert, find_sparse_calls)
OPTIONAL: tuple[Pass, ...] = (merge_siblings, *_gpu_passes())

# Each is called with the context of every graph, once it is rewritten: for reports.
observers: list[Callable[[Context], None]] = []


def check_disabled(names: Sequence[str]) -> None:
    """Refuse names of what is no pass, or can't be left out.

    Raises:
        ValueError: lists the passes to choose from.
    """
    optional = [each.__name__ for each in OPTIONAL]
    unknown = sorted(set(names) - set(optional))
    if unknown:
        raise ValueError(f"disable names {', '.join(unknown)}; the passes to choose from are {', '.join(optional)}")


def run(module: GraphModule, inputs: Sequence[Any], options: Options) -> Context:
    """Run the passes over Dynamo's graph.

    Args:
        module: Dynamo's graph module; it is changed.
        inputs: one example per graph input, weights as the Parameters themselves.
        options: what the passes may do.

    Returns:
        The context: the rewritten module and what was done.

    Raises:
        RewriteError: a Linear of `options.schedule` can't be made sparse; names it.
        ValueError: `options.disable` names no pass, or one that can't be left out.
    """
    check_disabled(options.disable)
    context = Context(module, list(inputs), options)
    for each in (*REQUIRED, *OPTIONAL):
        if each.__name__ not in options.disable:
            each(context)
    context.module.graph.lint()
    context.module.recompile()
    log.info("passes: %s", dict(context.counts))
    for observer in observers:
        observer(context)
    return context

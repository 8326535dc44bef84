"""Which inputs of a graph stay where they are in memory, from one call to the next."""

import torch

from was_fx.passes.graph.context import Context
from was_fx.passes.graph.matching import storage, written_storages


def fixed_inputs(context: Context) -> list[int]:
    """Positions of weights and buffers, of the inputs that the passes added, and of what the graph writes in place."""
    written = written_storages(context.module.graph)
    added = set(context.extra.values())
    return [
        position
        for position, node in enumerate(context.module.graph.find_nodes(op="placeholder"))
        if node in added
        or storage(node) in written
        or isinstance(context.input_of(node), torch.nn.Parameter)
        or (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    ]


def has_state(context: Context) -> bool:
    """Whether the graph writes to an input, as with a static cache; a cache that grows is a new input each time."""
    written = written_storages(context.module.graph)
    return any(storage(node) in written for node in context.module.graph.find_nodes(op="placeholder"))

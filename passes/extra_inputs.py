"""Graph inputs beyond Dynamo's own.

    before                          after
    placeholder  L_x_               placeholder  L_x_
    placeholder  L_weight_          placeholder  L_weight_
                                    placeholder  was_threshold_0     # [K] fp32, static address

Thresholds are inputs and not constants of the graph, because Dynamo lets two models of one shape share a graph: a
constant of the first would answer for the second. `with_extra_inputs` reads them from the weights of each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.source import SyntheticLocalSource
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from was_fx.passes.bindings import bindings, resolve
from was_fx.passes.graph.errors import RewriteError


@dataclass(frozen=True)
class ExtraInput:
    """A graph input that the passes added: a tensor of a binding of the weight at `position`.

    Modules of one shape share a graph, so the weight of a call may bind another name than the one the graph was made
    with; then `path`, relative to the compiled module, tells its bindings apart. A weight without a binding is
    dense: densified since, or of a model that never was sparse. All its channels are kept.
    """

    position: int
    name: str
    path: str | None
    attribute: Literal["threshold", "counts"]
    size: int

    def read(self, inputs: Sequence[Any]) -> Tensor:
        """The tensor for this call's graph inputs."""
        weight = inputs[self.position]
        binding = bindings(weight).get(self.name) or resolve(weight, self.path)
        if binding is not None:
            return getattr(binding, self.attribute)
        if bindings(weight):
            raise RewriteError(
                f"a graph compiled for {self.name!r} was run on a weight that is scheduled as "
                f"{', '.join(bindings(weight))}; call torch.compiler.reset() and run the model again"
            )
        if self.attribute == "counts":
            return torch.zeros(self.size, dtype=torch.int64, device=weight.device)
        return torch.full((self.size,), -1.0, device=weight.device)  # no magnitude is below it


def add_placeholder(graph: Graph, name: str, tensor: Tensor) -> Node:
    """Add a graph input after the last one, marked as living at a static address (CUDA graphs need not copy it)."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    mode = detect_fake_mode([n.meta.get("example_value") for n in graph.find_nodes(op="placeholder")])
    node.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = SyntheticLocalSource(name)  # type: ignore[attr-defined]  # AOTAutograd asks every input for one
    return node


def own_copy(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph module that accepts new inputs; Dynamo's own must keep the inputs it has."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, nodes)
    original = module.graph.output_node()
    graph.output(output).meta.update(original.meta)
    for node in module.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            nodes[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copy = GraphModule(module, graph)
    copy.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        copy._param_name_to_source = module._param_name_to_source
    return copy


def with_extra_inputs(compiled: Callable[..., Any], extra: Sequence[ExtraInput]) -> Callable[..., Any]:
    """`compiled`, called with Dynamo's inputs only."""
    if not extra:
        return compiled

    @torch.compiler.disable
    def call(*inputs: Any) -> Any:
        return compiled(*inputs, *[item.read(inputs) for item in extra])

    return call

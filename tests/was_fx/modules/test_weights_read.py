"""What counts as reading a weight."""

import pytest
import torch
from torch import nn

from was_fx.modules.linears import find_linears
from was_fx.modules.quantized_linear import QuantizedLinear
from was_fx.modules.weights_read import noting_reads
from was_fx.sparse.quantize import quantize


@pytest.mark.parametrize(
    ("use", "read"),
    [
        (lambda weight, x: weight @ x, True),
        (lambda weight, x: nn.functional.linear(input=x.t(), weight=weight), True),
        (lambda weight, x: torch.cat([weight, weight]) @ x, True),
        (lambda weight, x: weight.data @ x, True),
        (lambda weight, x: torch.ops.aten.mm(weight, x), True),
        (lambda weight, x: x.to(weight.dtype).to(weight.device), False),
        (lambda weight, x: x[: weight.shape[0], : weight.dim()], False),
        (lambda weight, x: x, False),
    ],
    ids=["@", "linear", "cat", "data", "aten", "dtype", "shape", "nothing"],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_reads(llama, use, read, quantised):
    if quantised:
        quantize(llama, {"*.q_proj": "int8"})
    name = "model.layers.0.self_attn.q_proj"
    linears = find_linears(llama)
    module = linears[name].module
    assert isinstance(module, QuantizedLinear) == quantised
    with torch.no_grad(), noting_reads(linears) as found:
        use(module.weight, torch.ones(module.in_features, 2))
    assert found == ({name} if read or quantised else set())  # a quantised weight is made anew to be looked at


def test_each_linear_of_a_shared_weight_is_named(llama):
    first, second = (layer.mlp.up_proj for layer in llama.model.layers[:2])
    second.weight = first.weight
    with noting_reads(find_linears(llama)) as found:
        first.weight * 2
    assert found == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}

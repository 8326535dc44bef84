"""SwiGLU and the like list their product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.gated_product_compact import gated_product_compact_op

K = 10
SCHEDULE = {"gate": 0.3, "up": 0.5, "down": 0.05}


class MLP(nn.Module):
    """gate, up and down, with `product` (module, x) -> what down reads."""

    def __init__(self, product, bias=False, dtype=torch.float32):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, K, bias), nn.Linear(12, K, bias), nn.Linear(K, 12)
        self.other = nn.Linear(K, 3)
        self.product = product
        self.to(dtype)

    def forward(self, x):
        return self.down(self.product(self, x))


class Fused(nn.Module):
    """gate and up as one Linear, which `parts` cuts."""

    def __init__(self, parts, bias=False):
        super().__init__()
        self.gate_up, self.down, self.parts = nn.Linear(12, 2 * K, bias), nn.Linear(K, 12), parts

    def forward(self, x):
        gate, up = self.parts(self.gate_up(x))
        return self.down(up * F.silu(gate))


def swiglu(m, x):
    return F.silu(m.gate(x)) * m.up(x)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    ("bias", "flipped", "dtype"), [(False, True, torch.float32), (True, False, torch.bfloat16)], ids=str
)
def test_gated_product_is_fused(listed, name, bias, dtype, flipped):
    act = ACTIVATIONS[name]

    def product(m, x):
        return m.up(x) * act(m.gate(x)) if flipped else act(m.gate(x)) * m.up(x)

    module = listed(MLP(product, bias, dtype), SCHEDULE, torch.randn(1, 1, 12, dtype=dtype))
    (node,) = [each for each in module.context.module.graph.nodes if each.target is gated_product_compact_op]
    assert node.args[4] == name
    assert [each is not None for each in node.args[2]] == [bias, bias]
    assert module.context.counts["fused gated products"] == 1
    assert module.targets[compact_op] == 1  # that of gate and up


@pytest.mark.parametrize(
    "parts",
    [
        lambda y: y.chunk(2, dim=-1),
        lambda y: torch.chunk(y, 2, dim=-1),
        lambda y: y.split(K, dim=-1),
        lambda y: y.split([K, K], dim=-1),
        lambda y: (y.chunk(2, dim=-1)[-2], y.chunk(2, dim=-1)[-1]),
    ],
)
def test_halves_of_one_linear_are_gate_and_up(listed, parts):
    module = listed(Fused(parts), {"gate_up": 0.3, "down": 0.05}, torch.randn(1, 1, 12))
    assert module.context.counts["fused gated products"] == 1


def written(m, x):
    product = swiglu(m, x)
    product.add_(1.0)
    return product


def written_gate(m, x):
    return F.silu(m.gate(x), inplace=True) * m.up(x)


def one_gate_for_all(m, x):
    return F.sigmoid(m.gate(x)[..., :1]) * m.up(x)


NO_PRODUCT = "its input is not a gated product"
TWO = "gate and up are not read from one product"


@pytest.mark.parametrize(
    ("module", "schedule", "reason"),
    [
        (lambda: MLP(swiglu), SCHEDULE, None),
        (lambda: MLP(lambda m, x: F.silu(m.gate(x)) * m.gate(x)), {"gate": 0.3, "down": 0.05}, None),
        (lambda: MLP(lambda m, x: F.silu(m.gate(x)) + m.up(x)), SCHEDULE, NO_PRODUCT),
        (lambda: MLP(lambda m, x: F.gelu(m.up(x))), {"up": 0.3, "down": 0.05}, NO_PRODUCT),
        (lambda: MLP(lambda m, x: torch.tanh(m.gate(x)) * m.up(x)), SCHEDULE, NO_PRODUCT),
        (lambda: MLP(lambda m, x: F.silu(m.gate(x)) * 2.0), {"gate": 0.3, "down": 0.05}, TWO),
        (lambda: MLP(lambda m, x: F.silu(m.gate(x)) * m.up(torch.sin(x))), SCHEDULE, TWO),
        (lambda: MLP(swiglu), {"gate": 0.3, "down": 0.05}, TWO),
        (lambda: MLP(one_gate_for_all), SCHEDULE, TWO),
        (lambda: MLP(written), SCHEDULE, "it is written in place"),
        (lambda: MLP(written_gate), SCHEDULE, "it is written in place"),
        (lambda: Fused(lambda y: y.chunk(2, dim=-1), bias=True), {"gate_up": 0.3, "down": 0.05}, TWO),
    ],
)
def test_what_is_fused_and_what_is_left_alone_with_a_reason(listed, module, schedule, reason):
    rewritten = listed(module(), schedule, torch.randn(1, 1, 12))
    assert rewritten.context.counts["fused gated products"] == (reason is None)
    assert (gated_product_compact_op in rewritten.targets) == (reason is None)
    assert reason is None or reason in [why for _, why in rewritten.context.declined]


def test_two_readers_of_the_product_decline(listed):
    class Two(MLP):
        def forward(self, x):
            product = self.product(self, x)
            return self.down(product), self.other(product)

    module = listed(Two(swiglu), {**SCHEDULE, "other": 0.1}, torch.randn(1, 1, 12))
    assert "more than one Linear reads the gated product" in [why for _, why in module.context.declined]


def test_product_that_is_read_elsewhere(listed):
    class Read(MLP):
        def forward(self, x):
            product = self.product(self, x)
            return self.down(product), torch.sin(product)

    assert listed(Read(swiglu), SCHEDULE, torch.randn(1, 1, 12)).context.counts["fused gated products"] == 1


def test_pass_can_be_left_out(listed):
    module = listed(MLP(swiglu), SCHEDULE, torch.randn(1, 1, 12), disable=("fuse_gated_products",))
    assert gated_product_compact_op not in module.targets
    assert module.targets[compact_op] == 2

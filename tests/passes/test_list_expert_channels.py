"""Products with chosen experts are split into the listing of channels and the product."""

import pytest
import torch
from torch import nn

from was_fx.compile.backend import was
from was_fx.kernels.linear.gather_experts import gather_experts_op, gather_quantized_experts_op
from was_fx.kernels.linear.quantized_experts import quantized_experts
from was_fx.kernels.linear.sparse_experts import reference, sparse_experts
from was_fx.kernels.ops.compact_experts import compact_experts_op
from was_fx.kernels.quantized.fit import quantize_int8
from was_fx.passes.find_sparse_calls import EXPERTS


class QuantisedExperts(nn.Module):
    """The same with rows of int8."""

    def __init__(self) -> None:
        super().__init__()
        rows = [quantize_int8(torch.randn(32, 16, generator=torch.Generator().manual_seed(e))) for e in range(4)]
        self.register_buffer("codes", torch.stack([each.codes for each in rows]))
        self.register_buffer("scales", torch.stack([each.scales for each in rows]))
        self.register_buffer("threshold", torch.rand(4, 16, generator=torch.Generator().manual_seed(4)))

    def forward(self, x):
        experts = (x[:, :2] > 0).long() + torch.tensor([0, 2])
        return quantized_experts(x * 2, self.codes, self.scales, None, None, self.threshold, experts.flatten(), None)


class Experts(nn.Module):
    """A product with experts, for experts that are chosen by the input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(4, 16, 24, generator=random).mT)
        self.register_buffer("bias", torch.randn(4, 24, generator=random) if bias else None)
        self.register_buffer("threshold", torch.rand(4, 16, generator=random))

    def forward(self, x, tokens=None, dense=False):
        experts = (x[:, :2] > 0).long() + torch.tensor([0, 2])
        threshold = None if dense else self.threshold
        return torch.relu(sparse_experts(x * 2, self.weight, self.bias, threshold, experts.flatten(), tokens))

    def expected(self, x, tokens=None):
        experts = (x[:, :2] > 0).long() + torch.tensor([0, 2])
        return torch.relu(reference(x * 2, self.weight, self.bias, self.threshold, experts.flatten(), tokens))


def compiled(module, **options):
    return torch.compile(module, backend=was, options={"lowering": "eager", "lists": True, **options})


def targets(context):
    return [node.target for node in context.module.graph.nodes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_is_split(bias, rows, contexts):
    module, x = Experts(bias), torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled(module)(x), module.expected(x))
    (context,) = contexts
    assert context.counts["sparse"] == context.counts["listed"] == 1
    assert context.decode == (rows == 1)
    assert targets(context).count(compact_experts_op) == targets(context).count(gather_experts_op) == 1
    assert not any(target in EXPERTS for target in targets(context))


@pytest.mark.parametrize(
    ("options", "tokens", "words"),
    [
        ({"lists": False}, None, ""),
        ({"disable": ("list_expert_channels",)}, None, ""),
        ({}, torch.tensor([True, False, True]), "some tokens keep every channel"),
    ],
)
def test_what_is_left_whole_is_right(options, tokens, words, contexts):
    module, x = Experts(True), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled(module, **options)(x, tokens), module.expected(x, tokens))
    (context,) = contexts
    assert not context.counts["listed"]
    assert compact_experts_op not in targets(context)
    assert [reason.rpartition(": ")[2] for _, reason in context.declined] == ([words] if words else [])


def test_a_quantised_product_is_split(contexts):
    module, x = QuantisedExperts(), torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled(module)(x), module(x), rtol=1e-4, atol=1e-4)
    (context,) = contexts
    assert context.counts["listed"] == targets(context).count(gather_quantized_experts_op) == 1


def test_a_dense_product_is_none(contexts):
    module, x = Experts(True), torch.randn(1, 16)
    compiled(module)(x, dense=True)
    assert not any(context.counts["listed"] for context in contexts)

"""Sparse Linears are found with their arguments and names, and a decode step is told."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.find_sparse_calls import find_sparse_calls
from was_fx.passes.graph.context import Context


def find_only(module, inputs, options):
    context = Context(module, list(inputs), options)
    find_sparse_calls(context)
    return context


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.free, self.layers = nn.Linear(12, 12), nn.Linear(12, 12), nn.ModuleList([Conv1D(12, 12)])
        self.head = nn.Linear(12, 7, bias=False)

    def forward(self, x):
        return self.head(self.layers[0](self.free(self.a(x)))[:, -1:])


SCHEDULE = {"a": 0.4, "layers.0": 0.2, "head": 0.1}


def test_calls_have_names_and_arguments(rewrite):
    module = rewrite(Block(), SCHEDULE, run=find_only)
    x = torch.randn(1, 3, 12)
    module(x)
    context = module.context
    assert [call.name for call in context.calls] == list(SCHEDULE)
    assert context.counts == {"sparse": 3}
    for call in context.calls:
        linear = module.module.get_submodule(call.name)
        weight = call.weight.args[0] if call.name == "layers.0" else call.weight  # W [N, K], a view of Wᵀ
        assert context.input_of(weight) is linear.weight
        assert (call.bias is None) == (linear.bias is None)
        assert context.input_of(call.threshold) is linear.was_threshold
        assert call.tokens is None
    assert context.input_of(context.calls[0].x) is x


@pytest.mark.parametrize("prefill", ["sparse", "half"])
def test_tokens_of_a_prompt_are_nodes(rewrite, prefill):
    module = rewrite(Block(), SCHEDULE, run=find_only, prefill=prefill)
    module(torch.randn(1, 3, 12))
    assert [call.tokens is None for call in module.context.calls] == [False, False, True]  # the head's one token


def test_dense_prompts_have_none(rewrite):
    module = rewrite(Block(), {"a": 0.4}, run=find_only, prefill="dense")
    x = torch.randn(1, 3, 12)
    module(x)
    assert module.context.calls == []
    assert module.context.decode is False
    module(x[:, :1])
    assert [call.name for call in module.context.calls] == ["a"]


@pytest.mark.parametrize(
    ("shape", "decode"),
    [((1, 1, 12), True), ((4, 1, 12), True), ((1, 5, 12), False), ((4, 2, 12), False)],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_decode_step_is_one_token_for_most(rewrite, shape, decode, dynamic):
    module = rewrite(Block(), SCHEDULE, dynamic, run=find_only)
    module(torch.randn(shape))
    assert module.context.decode is decode


@pytest.mark.parametrize(("shape", "decode"), [((12,), True), ((1, 12), True), ((3, 12), False)], ids=str)
def test_inputs_of_few_dimensions(rewrite, shape, decode):
    module = rewrite(nn.Sequential(nn.Linear(12, 5)), {"0": 0.4}, run=find_only)
    module(torch.randn(shape))
    assert module.context.decode is decode


class Written(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.a, self.call = nn.Linear(12, 5), call

    def forward(self, x):
        return self.call(self.a, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, x: sparse_linear(x, a.weight, a.bias, a.was_threshold, None),
        lambda a, x: torch.ops.was.sparse_linear(x, a.weight, a.bias, a.was_threshold, None),
        lambda a, x: torch.ops.was.sparse_linear(x, a.weight, a.bias, threshold=a.was_threshold, tokens=None),
        lambda a, x: sparse_linear(x=x, weight=a.weight, bias=a.bias, threshold=a.was_threshold, tokens=None),
    ],
    ids=["overload", "packet", "some by name", "all by name"],
)
def test_op_is_found_however_it_is_called(rewrite, call):
    module = rewrite(Written(call), {"a": 0.4}, run=find_only)
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x))
    assert len(module.context.calls) == 1
    assert module.context.input_of(module.context.calls[0].threshold) is module.module.a.was_threshold


def test_linear_called_twice_is_found_twice(rewrite):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(torch.sin(self.a(x)))

    module = rewrite(Twice(), {"a": 0.4}, run=find_only)
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", torch.sin(module.linear("a", x))))
    first, second = module.context.calls
    assert (first.name, second.name) == ("a", "a")
    assert (first.weight, first.threshold) == (second.weight, second.threshold)


def test_graph_without_sparse_linears(rewrite):
    module = rewrite(nn.SiLU(), {})
    x = torch.randn(3)
    assert torch.equal(module(x), torch.nn.functional.silu(x))
    assert module.context.counts == {"sparse": 0}

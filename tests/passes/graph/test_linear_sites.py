"""Which spellings of a Linear are recognised, and which are refused."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.graph.context import Context
from was_fx.passes.graph.errors import RewriteError
from was_fx.passes.graph.linear_sites import linear_sites

PRODUCTS = {
    torch._C._nn.linear,
    torch.addmm,
    torch.matmul,
    torch.mm,
    operator.matmul,
    "matmul",
    "mm",
}


class Spelled(nn.Linear):
    """A Linear that is computed in its own way."""

    def __init__(self, compute, k, n):
        super().__init__(k, n)
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight, self.bias)


class One(nn.Module):
    def __init__(self, compute, k=12, n=10):
        super().__init__()
        self.a = Spelled(compute, k, n)

    def forward(self, x):
        return self.a(x)


WITH_BIAS = {
    "F.linear": lambda x, w, b: F.linear(x, w, b),
    "F.linear, bias by name": lambda x, w, b: F.linear(x, w, bias=b),
    "F.linear, all by name": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "matmul and bias": lambda x, w, b: torch.matmul(x, w.t()) + b,
}
WITHOUT_BIAS = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear, None": lambda x, w, b: F.linear(x, w, None),
    "@ T": lambda x, w, b: x @ w.T,
    "@ mT": lambda x, w, b: x @ w.mT,
    "matmul, t()": lambda x, w, b: torch.matmul(x, w.t()),
    "matmul by name": lambda x, w, b: torch.matmul(input=x, other=w.t()),
    "method matmul": lambda x, w, b: x.matmul(w.t()),
    "mm": lambda x, w, b: torch.mm(x[0], w.t()).unsqueeze(0),
    "mm by name": lambda x, w, b: torch.mm(x[0], mat2=w.t()).unsqueeze(0),
    "method mm": lambda x, w, b: x[0].mm(w.t()).unsqueeze(0),
    "torch.t": lambda x, w, b: x @ torch.t(w),
    "transpose(0, 1)": lambda x, w, b: x @ w.transpose(0, 1),
    "transpose(1, 0)": lambda x, w, b: x @ w.transpose(1, 0),
    "transpose(-1, -2)": lambda x, w, b: x @ w.transpose(-1, -2),
    "transpose by name": lambda x, w, b: x @ w.transpose(dim0=0, dim1=1),
    "torch.transpose": lambda x, w, b: x @ torch.transpose(w, 0, 1),
    "swapaxes": lambda x, w, b: x @ w.swapaxes(0, 1),
    "swapdims": lambda x, w, b: x @ torch.swapdims(w, 0, -1),
    "permute(1, 0)": lambda x, w, b: x @ w.permute(1, 0),
    "permute((-1, 0))": lambda x, w, b: x @ w.permute((-1, 0)),
    "permute by name": lambda x, w, b: x @ w.permute(dims=(1, 0)),
    "torch.permute": lambda x, w, b: x @ torch.permute(w, (1, 0)),
}


@pytest.mark.parametrize(
    ("compute", "bias"),
    [
        *(pytest.param(compute, True, id=f"{name}, bias") for name, compute in WITH_BIAS.items()),
        *(pytest.param(compute, False, id=name) for name, compute in WITHOUT_BIAS.items()),
    ],
)
def test_spelling_is_recognised(rewrite, compute, bias):
    module = rewrite(One(compute), {"a": 0.5}, insert=True)
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x, bias=bias))
    assert module.targets[sparse_linear] == 1
    assert not PRODUCTS & set(module.targets)
    assert module.context.counts["inserted"] == module.context.counts["sparse"] == 1


NOT_A_LINEAR = {
    "cast": lambda x, w, b: F.linear(x, w.to(torch.float32, copy=True)),
    "scaled": lambda x, w, b: F.linear(x, w * 2),
    "sliced": lambda x, w, b: F.linear(x, w[:5]),
    "not transposed": lambda x, w, b: x @ w,
    "transposed twice": lambda x, w, b: x @ w.t().t(),
    "identity permutation": lambda x, w, b: x @ w.permute(0, 1),
    "identity transpose": lambda x, w, b: x @ w.transpose(0, 0),
    "on the left": lambda x, w, b: (w @ x.mT).mT,
    "scaled addmm": lambda x, w, b: torch.addmm(b, x[0], w, alpha=2),
    "einsum": lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w),
    "output buffer": lambda x, w, b: torch.matmul(x, w.t(), out=torch.empty(1, 3, 12)),
}


@pytest.mark.parametrize("compute", NOT_A_LINEAR.values(), ids=NOT_A_LINEAR.keys())
def test_scheduled_weight_in_any_other_use_is_an_error_that_names_it(rewrite, compute):
    module = rewrite(One(compute, 12, 12), {"a": 0.5}, insert=True)
    with pytest.raises(BackendCompilerFailed, match="the schedule does not fit the compiled graph") as caught:
        module(torch.randn(1, 3, 12))
    error = caught.value.inner_exception
    assert type(error) is RewriteError
    assert error.linears == {"a": "no Linear of the graph has this name"}


@pytest.mark.parametrize("compute", NOT_A_LINEAR.values(), ids=NOT_A_LINEAR.keys())
def test_any_other_use_of_an_unscheduled_weight_is_left_alone(rewrite, compute):
    module = rewrite(One(compute, 12, 12), {}, insert=True)
    x = torch.randn(1, 3, 12)
    assert torch.equal(module(x), module.module(x))
    assert module.context.counts["inserted"] == module.context.counts["sparse"] == 0


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), Conv1D(10, 12)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)


@pytest.mark.parametrize("scheduled", [{"a"}, {"b"}, {"c"}, {"a", "b", "c"}], ids=sorted)
def test_kinds_of_linear(rewrite, scheduled):
    module = rewrite(Projections(), dict.fromkeys(sorted(scheduled), 0.5), insert=True)
    x = torch.randn(2, 3, 12)
    dense = module.module(x)
    for name, y, unchanged in zip("abc", module(x), dense, strict=True):
        torch.testing.assert_close(y, module.linear(name, x) if name in scheduled else unchanged)
    assert module.context.counts["inserted"] == module.targets[sparse_linear] == len(scheduled)
    assert sum(module.targets[product] for product in PRODUCTS) == 3 - len(scheduled)


def test_sites_are_those_of_the_graph_in_order(rewrite):
    found = []

    def sites_only(module, inputs, options):
        context = Context(module, list(inputs), options)
        found.extend(linear_sites(context))
        return context

    module = rewrite(Projections(), {}, run=sites_only)
    module(torch.randn(2, 3, 12))
    assert [site.path for site in found] == ["a", "b", "c"]
    assert [site.input_major for site in found] == [False, False, True]
    assert [site.bias is None for site in found] == [False, True, False]
    for site in found:
        assert module.context.input_of(site.weight) is module.weight(site.path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


@pytest.mark.parametrize("insert", [True, False])
def test_head_may_share_its_weight_with_the_embedding(rewrite, insert):
    module = rewrite(Tied(), {"head": 0.5}, insert=insert)
    tokens = torch.tensor([[3, 7, 19]])
    torch.testing.assert_close(module(tokens), module.linear("head", module.module.embed(tokens)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x), self.b(torch.sin(x))


@pytest.mark.parametrize("insert", [True, False])
def test_linears_that_share_a_weight_have_their_own_thresholds(rewrite, insert):
    module = rewrite(Twice(), {"a": 0.2, "b": 0.8}, insert=insert)
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", torch.sin(x)))


def test_one_of_two_that_share_a_weight_may_be_dense(rewrite):
    module = rewrite(Twice(), {"b": 0.8}, insert=True)
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.module.a(x))
    torch.testing.assert_close(b, module.linear("b", torch.sin(x)))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("insert", [True, False])
def test_names_below_a_wrapper_are_the_wrappers(rewrite, insert):
    module = rewrite(Wrapper(Twice()), {"inner.a": 0.2, "inner.b": 0.8}, insert=insert)
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("inner.a", x))
    torch.testing.assert_close(b, module.linear("inner.b", torch.sin(x)))
    assert [call.name for call in module.context.calls] == ["inner.a", "inner.b"]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        up = nn.ModuleDict({"up": nn.Linear(12, 12)})
        self.layers = nn.ModuleList([nn.Sequential(up["up"], nn.SiLU(), nn.Linear(12, 12)) for _ in range(2)])
        self.layers[1][0] = nn.Linear(12, 12)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("insert", [True, False])
def test_names_are_found_through_nested_containers(rewrite, insert):
    names = ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]
    module = rewrite(Nested(), {name: 0.1 * (i + 1) for i, name in enumerate(names)}, insert=insert)
    x = torch.randn(1, 3, 12)
    expected = x
    for i in range(2):
        expected = module.linear(f"layers.{i}.2", F.silu(module.linear(f"layers.{i}.0", expected)))
    torch.testing.assert_close(module(x), expected)
    assert [call.name for call in module.context.calls] == names


def test_graph_without_linears_runs_as_it_is(rewrite):
    module = rewrite(nn.SiLU(), {}, insert=True)
    x = torch.randn(3)
    assert torch.equal(module(x), F.silu(x))
    assert module.context.counts["inserted"] == 0

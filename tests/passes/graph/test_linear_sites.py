"""Which spellings of a Linear are recognised, and which are refused."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.sparse_linear import sparse_linear

PRODUCTS = {
    torch._C._nn.linear,
    torch.addmm,
    torch.matmul,
    torch.mm,
    operator.matmul,
    "matmul",
    "mm",
}


class One(nn.Module):
    """A Linear, and how it is computed."""

    def __init__(self, compute, k=12, n=10):
        super().__init__()
        self.a = nn.Linear(k, n)
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.a.weight, self.a.bias)


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
    module = rewrite(One(compute), {"a": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x, bias=bias))
    assert module.targets[sparse_linear] == 1
    assert not PRODUCTS & set(module.targets)
    assert module.context.counts["linears"] == module.context.counts["scheduled"] == 1


NOT_A_LINEAR = {
    "cast": (lambda x, w, b: F.linear(x, w.to(torch.float32, copy=True)), "to"),
    "scaled": (lambda x, w, b: F.linear(x, w * 2), "mul"),
    "sliced": (lambda x, w, b: F.linear(x, w[:5]), "getitem"),
    "not transposed": (lambda x, w, b: x @ w, "matmul"),
    "transposed twice": (lambda x, w, b: x @ w.t().t(), "t"),
    "identity permutation": (lambda x, w, b: x @ w.permute(0, 1), "permute"),
    "identity transpose": (lambda x, w, b: x @ w.transpose(0, 0), "transpose"),
    "on the left": (lambda x, w, b: (w @ x.mT).mT, "matmul"),
    "scaled addmm": (lambda x, w, b: torch.addmm(b, x[0], w, alpha=2), "addmm"),
    "einsum": (lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w), "einsum"),
}


@pytest.mark.parametrize(("compute", "use"), NOT_A_LINEAR.values(), ids=NOT_A_LINEAR.keys())
def test_scheduled_weight_in_any_other_use_is_an_error_that_names_it(rewrite, compute, use):
    module = rewrite(One(compute, 12, 12), {"a": 0.5}, prefill="all")
    with pytest.raises(BackendCompilerFailed) as caught:
        module(torch.randn(1, 3, 12))
    assert type(caught.value.inner_exception).__name__ == "RewriteError"
    message = str(caught.value.inner_exception)
    assert "\n  a: its weight is used by " in message
    assert use in message
    assert "leave these Linears out of the schedule" in message


@pytest.mark.parametrize(("compute", "use"), NOT_A_LINEAR.values(), ids=NOT_A_LINEAR.keys())
def test_any_other_use_of_an_unscheduled_weight_is_left_alone(rewrite, compute, use):
    module = rewrite(One(compute, 12, 12), {}, prefill="all")
    x = torch.randn(1, 3, 12)
    assert torch.equal(module(x), module.module(x))
    assert module.context.counts["linears"] == 0


def method_to_local():
    """The part of a DTensor as Dynamo of torch 2.11 writes it: by a function made for that call."""

    @torch.compiler.allow_in_graph
    def local(weight):
        return weight.view_as(weight)

    return local


def test_local_part_of_a_sharded_weight_is_recognised_as_a_function(rewrite):
    local = method_to_local()
    module = rewrite(One(lambda x, w, b: F.linear(x, local(w), b)), {"a": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x))
    assert module.targets[sparse_linear] == 1


def test_output_buffer_is_not_recognised(rewrite):
    module = rewrite(One(lambda x, w, b: torch.matmul(x, w.t(), out=torch.empty(1, 3, 10))), {"a": 0.5}, prefill="all")
    with pytest.raises(BackendCompilerFailed, match="a: its weight is used by t"):
        module(torch.randn(1, 3, 12))


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.c, self.d = Conv1D(10, 12), nn.Parameter(torch.randn(5, 12))

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), F.linear(x, self.d)


@pytest.mark.parametrize("scheduled", [{"a"}, {"b"}, {"c"}, {"d"}, {"a", "b", "c", "d"}], ids=sorted)
def test_kinds_of_linear(rewrite, scheduled):
    module = rewrite(Projections(), dict.fromkeys(sorted(scheduled), 0.5), prefill="all", disable=("merge_siblings",))
    x = torch.randn(2, 3, 12)
    dense = module.module(x)
    for name, y, unchanged in zip("abcd", module(x), dense, strict=True):
        torch.testing.assert_close(y, module.linear(name, x) if name in scheduled else unchanged)
    assert module.context.counts["linears"] == 4
    assert module.context.counts["scheduled"] == module.targets[sparse_linear] == len(scheduled)
    assert module.context.counts["dense (not scheduled)"] == 4 - len(scheduled)
    assert {site.input_major for site in module.context.sites if site.path == "c"} == {True}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_head_may_share_its_weight_with_the_embedding(rewrite):
    module = rewrite(Tied(), {"head": 0.5}, prefill="all")
    tokens = torch.tensor([[3, 7, 19]])
    torch.testing.assert_close(module(tokens), module.linear("head", module.module.embed(tokens)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x), self.b(torch.sin(x))


def test_linears_that_share_a_weight_have_their_own_thresholds(rewrite):
    module = rewrite(Twice(), {"a": 0.2, "b": 0.8}, prefill="all")
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", torch.sin(x)))


def test_use_that_no_name_of_a_shared_weight_explains_is_an_error(rewrite):
    class Functional(Twice):
        def forward(self, x):
            return F.linear(x, self.a.weight)

    module = rewrite(Functional(), {"a": 0.2, "b": 0.8}, prefill="all")
    with pytest.raises(BackendCompilerFailed, match="a: its weight is used by"):
        module(torch.randn(1, 3, 12))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_names_are_found_below_a_wrapper(rewrite):
    inner = rewrite(Twice(), {"a": 0.2, "b": 0.8})
    outer = rewrite(Wrapper(inner.module), {}, prefill="all")
    x = torch.randn(1, 3, 12)
    a, b = outer(x)
    torch.testing.assert_close(a, inner.linear("a", x))
    torch.testing.assert_close(b, inner.linear("b", torch.sin(x)))


def test_names_are_found_through_nested_containers(rewrite):
    block = nn.ModuleDict({"up": nn.Linear(12, 12)})

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(block["up"], nn.SiLU(), nn.Linear(12, 12)) for _ in range(2)])
            self.layers[1][0] = nn.Linear(12, 12)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    names = ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]
    module = rewrite(Nested(), {name: 0.1 * (i + 1) for i, name in enumerate(names)}, prefill="all")
    x = torch.randn(1, 3, 12)
    expected = x
    for i in range(2):
        expected = module.linear(f"layers.{i}.2", F.silu(module.linear(f"layers.{i}.0", expected)))
    torch.testing.assert_close(module(x), expected)
    assert [site.path for site in module.context.sites] == names
    linears = [n.meta["was_linear"] for n in module.context.module.graph.nodes if n.target is sparse_linear]
    assert linears == names


def test_graph_without_linears_runs_as_it_is(rewrite):
    module = rewrite(nn.SiLU(), {})
    x = torch.randn(3)
    assert torch.equal(module(x), F.silu(x))
    assert module.context.counts["linears"] == 0

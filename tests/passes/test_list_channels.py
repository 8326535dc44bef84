"""Sparse Linears of a decode step become a listing and a product with what is listed, or a product of a few tokens."""

import operator

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.gather_gemv import gather_gemv_op
from was_fx.kernels.linear.masked_gemm import masked_gemm_op
from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.count_dropped import count_dropped_op


class Fan(nn.Module):
    """`count` Linears of one input, every other one with a bias, and one behind them."""

    def __init__(self, count, dtype=torch.float32):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(12, 5 + i, bias=i % 2 == 0) for i in range(count))
        self.last = nn.Linear(5, 7)
        self.to(dtype)

    def forward(self, x):
        outputs = [linear(x) for linear in self.linears]
        return self.last(outputs[0]), *outputs


def schedule(count):
    return {**{f"linears.{i}": 0.2 + i / 10 for i in range(count)}, "last": 0.1}


@pytest.mark.parametrize("shape", [(1, 1, 12), (1, 12), (12,)], ids=str)
@pytest.mark.parametrize(("count", "calls"), [(1, 2), (2, 2), (4, 2), (5, 3), (9, 4)])
def test_at_most_four_siblings_share_a_call(listed, count, calls, shape):
    module = listed(Fan(count), schedule(count), torch.randn(shape))
    assert module.targets[compact_op] == module.targets[gather_gemv_op] == calls
    assert not {sparse_linear, sparse_siblings} & set(module.targets)
    assert module.context.calls == []
    assert module.context.counts["listed"] == count + 1
    assert len(module.context.parts) == count + 1


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "reason"),
    [
        ((1, 1, 12), torch.float32, {"lists": True}, None),
        ((1, 1, 12), torch.bfloat16, {"lists": True}, None),
        ((1, 1, 12), torch.float16, {"lists": True}, None),
        ((1, 1, 12), torch.float64, {"lists": True}, "x is torch.float64"),
        ((2, 1, 12), torch.float32, {"lists": True}, "more than one token"),
        ((1, 3, 12), torch.float32, {"lists": True}, "more than one token"),
        ((8, 1, 12), torch.bfloat16, {"lists": True}, None),
        ((1, 2, 12), torch.float16, {"lists": True}, None),
        ((4, 4, 12), torch.float16, {"lists": True}, None),
        ((17, 1, 12), torch.bfloat16, {"lists": True}, "not 1 to 16 tokens"),
        ((1, 3, 12), torch.float32, {"lists": True, "prefill": "half"}, "some tokens keep every channel"),
        ((1, 1, 12), torch.float32, {"lists": False}, "not on a GPU"),
        ((1, 1, 12), torch.float32, {"lists": None}, "not on a GPU"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("meanings")
def test_few_tokens_of_a_gpu_are_rewritten(rewrite, shape, dtype, options, reason):
    module = rewrite(Fan(2, dtype), schedule(2), **options)
    module(torch.randn(shape, dtype=dtype))
    assert bool({sparse_linear, sparse_siblings} & set(module.targets)) == (reason is not None)
    assert module.context.counts["listed"] == (0 if reason else 3)
    declined = {(name, f"channels are not listed: {reason}") for name in ("linears.0", "linears.1", "last")}
    said = reason not in (None, "not on a GPU")  # elsewhere there is nothing to say
    assert declined <= set(module.context.declined) if said else declined.isdisjoint(module.context.declined)


@pytest.mark.parametrize("shape", [(2, 1, 12), (1, 3, 12), (2, 8, 12), (5, 12)], ids=str)
@pytest.mark.parametrize(("count", "calls"), [(1, 2), (4, 2), (5, 3), (9, 4)])
def test_few_tokens_are_masked_by_the_product(listed, count, calls, shape):
    module = listed(Fan(count, torch.float16), schedule(count), torch.randn(shape).half())
    assert module.targets[masked_gemm_op] == calls
    assert not {compact_op, gather_gemv_op, sparse_linear, sparse_siblings} & set(module.targets)
    assert module.context.calls == []
    assert module.context.counts["listed"] == len(module.context.parts) == count + 1


@pytest.mark.usefixtures("meanings")
@pytest.mark.parametrize("shape", [(-1, 1, 12), (1, -1, 12), (-1, 12)], ids=str)
def test_one_graph_serves_any_few_tokens_and_another_many(rewrite, shape):
    model = Fan(2, torch.float16)
    module = rewrite(model, schedule(2), dynamic=True, lists=True)
    for tokens, graphs, products in [(3, 1, 2), (2, 1, 2), (16, 1, 2), (17, 2, 0), (40, 2, 0), (8, 2, 0)]:
        x = torch.randn(tokens, 12).half().view(shape)
        y = module(x)[1]
        torch.testing.assert_close(y, module.linear("linears.0", x), rtol=4e-3, atol=4e-3)
        assert (len(module.contexts), module.targets[masked_gemm_op]) == (graphs, products)


class Sliced(nn.Module):
    """A Linear that reads the last `keep` tokens."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x, keep):
        return self.head((2 * x)[:, slice(-keep, None), :])


def test_slices_that_leave_nothing_out_are_passed_over(listed, rewrite):
    module = listed(Sliced(), {"head": 0.5}, torch.randn(1, 1, 12), 1)
    (listing,) = module.context.module.graph.find_nodes(op="call_function", target=compact_op)
    assert listing.args[0].target is operator.mul
    cut = rewrite(Sliced(), {"head": 0.5}, lists=True)
    cut(torch.randn(1, 3, 12), 1)
    (listing,) = cut.context.module.graph.find_nodes(op="call_function", target=compact_op)
    assert listing.args[0].target is operator.getitem, "the last of three tokens is not all of them"


def test_pass_can_be_left_out(rewrite):
    module = rewrite(Fan(2), schedule(2), lists=True, disable=("list_channels",))
    module(torch.randn(1, 1, 12))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (1, 1)
    assert module.context.parts == {}


def test_unmerged_siblings_are_listed_one_by_one(listed):
    module = listed(Fan(3), schedule(3), torch.randn(1, 1, 12), disable=("merge_siblings",))
    assert module.targets[compact_op] == 4


def test_names_of_the_linears_stay_on_the_product(listed):
    module = listed(Fan(5), schedule(5), torch.randn(1, 1, 12))
    products = [node for node in module.context.module.graph.nodes if node.target is gather_gemv_op]
    names = [node.meta["was_linear"] for node in products]
    assert names == [tuple(f"linears.{i}" for i in range(4)), ("linears.4",), ("last",)]


@pytest.mark.usefixtures("meanings")
def test_counted_steps_still_count(rewrite):
    model, x = Fan(2), torch.randn(1, 1, 12)
    module = rewrite(model, schedule(2), lists=True)
    for linear in (*model.linears, model.last):
        linear.was_counts = torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        _, *outputs = module(x)
    for i, y in enumerate(outputs):
        torch.testing.assert_close(y, module.linear(f"linears.{i}", x))
        dropped = int((x.abs() <= module.thresholds[f"linears.{i}"]).sum())
        assert model.linears[i].was_counts.tolist() == [2 * dropped, 24]
    assert model.last.was_counts[1] == 10
    assert module.context.counts["listed"] == 3
    assert module.targets[count_dropped_op] == 3


def test_gradients_keep_the_call_whole(rewrite):
    module = rewrite(Fan(2), schedule(2), lists=True)
    x = torch.randn(1, 1, 12, requires_grad=True)
    y = module.compiled(x)[1]
    y.sum().backward()
    assert ((x.grad == 0) == (x.abs() <= module.thresholds["linears.0"])).all()
    assert module.context.counts["listed"] == 0
    assert ("last", "channels are not listed: it has gradients") in module.context.declined


def test_weight_used_twice(listed):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(torch.sin(self.a(x)))

    module = listed(Twice(), {"a": 0.3}, torch.randn(1, 1, 12))
    assert module.targets[gather_gemv_op] == 2


def test_bias_that_is_computed(listed):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            bias = torch.tanh(self.a(x)).sum((0, 1))
            return sparse_linear(x, self.b.weight, bias, self.b.was_threshold, None)

    module = listed(Computed(), {"a": 0.3, "b": 0.2}, torch.randn(1, 1, 12))
    assert module.context.counts["listed"] == 2


def test_input_major_weights(listed):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Conv1D(12, 12), Conv1D(3, 12)

        def forward(self, x):
            return self.a(x), self.b(x)

    module = listed(Pair(), {"a": 0.01, "b": 0.02}, torch.randn(1, 1, 12))
    assert module.targets[gather_gemv_op] == 1


def test_unread_output_does_not_matter(listed):
    class Unread(Fan):
        def forward(self, x):
            return super().forward(x)[0]

    assert listed(Unread(3), schedule(3), torch.randn(1, 1, 12)).context.counts["listed"] == 4


@pytest.mark.usefixtures("meanings")
def test_nothing_or_everything_kept(rewrite):
    x = torch.randn(1, 1, 12)
    for threshold in (0.0, float("inf")):
        model = Fan(2)
        module = rewrite(model, dict.fromkeys(schedule(2), torch.full((12,), threshold)) | {"last": 0.1}, lists=True)
        _, a, b = module(x)
        keep = float(threshold == 0)
        torch.testing.assert_close(a, model.linears[0](keep * x))
        torch.testing.assert_close(b, model.linears[1](keep * x))

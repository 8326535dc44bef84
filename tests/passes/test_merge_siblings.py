"""Sparse Linears of one input become one call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.kernels.ops.channel_threshold import channel_threshold_op
from was_fx.kernels.ops.count_dropped import count_dropped_op


class Attention(nn.Module):
    """Siblings q, k, v and siblings gate, up; o and down have an input of their own."""

    def __init__(self, q_bias=False, k_bias=False, v_bias=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12, q_bias), nn.Linear(12, 6, k_bias), nn.Linear(12, 6, v_bias)
        self.o = nn.Linear(12, 12, bias=False)
        self.gate, self.up = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
        self.down = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        h = torch.sin(x)
        x = x + self.o(self.q(h) * torch.cat([self.k(h), self.v(h)], dim=-1))
        h = torch.sin(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


SCHEDULE = {"q": 0.2, "k": 0.4, "v": 0.6, "o": 0.2, "gate": 0.3, "up": 0.5, "down": 0.1}


def expected(module, x, dense=None):
    linear = module.linear
    h = torch.sin(x)
    x = x + linear("o", linear("q", h, dense) * torch.cat([linear("k", h, dense), linear("v", h, dense)], -1), dense)
    h = torch.sin(x)
    return x + linear("down", F.silu(linear("gate", h, dense)) * linear("up", h, dense), dense)


@pytest.mark.parametrize("size", [(1, 1, 12), (2, 9, 12)], ids=str)
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)], ids=str)
def test_groups_share_a_call_and_keep_their_own_thresholds(rewrite, size, biases):
    module = rewrite(Attention(*biases), SCHEDULE)
    x = torch.randn(size)
    torch.testing.assert_close(module(x), expected(module, x))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (2, 2)
    assert module.targets[torch.narrow] == 5
    assert module.context.counts["merged groups"] == 2
    assert module.context.counts["merged linears"] == 5
    assert module.context.counts["sparse"] == 7


def test_calls_are_those_of_the_merged_op_in_its_order(rewrite):
    module = rewrite(Attention(), SCHEDULE)
    module(torch.randn(1, 3, 12))
    context = module.context
    nodes = [node for node in context.module.graph.nodes if node.target in (sparse_linear, sparse_siblings)]
    assert [node.meta["was_linear"] for node in nodes if node.target is sparse_siblings] == [
        ("q", "k", "v"),
        ("gate", "up"),
    ]
    of = {call.name: call for call in context.calls}
    assert list(of) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [of[name].node for name in of] == [nodes[i] for i in (0, 0, 0, 1, 2, 2, 3)]
    for name, call in of.items():
        assert context.input_of(call.weight) is module.weight(name)
        assert context.input_of(call.threshold) is module.module.get_submodule(name).was_threshold
    assert nodes[0].args == (
        of["q"].x,
        [of[name].weight for name in "qkv"],
        [None] * 3,
        [of[name].threshold for name in "qkv"],
        None,
    )


def tokens_after_the_first(x):
    return (torch.arange(x.shape[1]) >= 1).expand(x.shape[:2])


class Masked(nn.Module):
    """Three Linears of one input, the last of which has tokens of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, tokens, others):
        return [
            sparse_linear(x, each.weight, each.bias, each.was_threshold, mask)
            for each, mask in zip((self.a, self.b, self.c), (tokens, tokens, others), strict=True)
        ]


@pytest.mark.parametrize("others", [tokens_after_the_first, lambda x: None], ids=["mask", "all"])
def test_siblings_of_different_tokens_stay_apart(rewrite, others):
    module = rewrite(Masked(), dict.fromkeys("abc", 0.4))
    x = torch.randn(2, 5, 12)
    tokens, others = torch.arange(5).expand(2, 5) >= 3, others(x)
    outputs = module(x, tokens, others)
    for name, y, mask in zip("abc", outputs, (tokens, tokens, others), strict=True):
        torch.testing.assert_close(y, module.linear(name, x, None if mask is None else ~mask))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (1, 1)
    assert module.context.counts["merged linears"] == 2
    (merged,) = module.context.module.graph.find_nodes(op="call_function", target=sparse_siblings)
    assert module.context.input_of(merged.args[4]) is tokens


@pytest.mark.parametrize("prefill", ["sparse", "half"])
def test_dense_tokens_of_a_prompt_stay_dense(rewrite, prefill):
    module = rewrite(Attention(), SCHEDULE, prefill=prefill)
    x = torch.randn(2, 5, 12)
    dense = torch.arange(5).expand(2, 5) < {"sparse": 1, "half": 3}[prefill]
    torch.testing.assert_close(module(x), expected(module, x, dense))


def test_pass_can_be_left_out(rewrite):
    module = rewrite(Attention(), SCHEDULE, disable=("merge_siblings",))
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), expected(module, x))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (0, 7)
    assert module.targets[torch.narrow] == 0
    assert len(module.context.calls) == 7


def test_unscheduled_sibling_stays_dense_beside_the_merged_call(rewrite):
    module = rewrite(Attention(), {name: SCHEDULE[name] for name in ("q", "v", "up")})
    x = torch.randn(1, 3, 12)
    h = torch.sin(x)
    mixed = module.linear("q", h) * torch.cat([module.module.k(h), module.linear("v", h)], dim=-1)
    y = x + module.module.o(mixed)
    h = torch.sin(y)
    y = y + module.module.down(F.silu(module.module.gate(h)) * module.linear("up", h))
    torch.testing.assert_close(module(x), y)
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (1, 1)
    assert module.targets[torch._C._nn.linear] == 4


class Fan(nn.Module):
    """Siblings whose input is itself a sibling's output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(12, 12) for _ in range(5))

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.c(a) + self.d(a) + self.e(b)


def test_group_may_feed_a_group(rewrite):
    module = rewrite(Fan(), dict.fromkeys("abcde", 0.3))
    x = torch.randn(1, 3, 12)
    a, b = module.linear("a", x), module.linear("b", x)
    torch.testing.assert_close(module(x), module.linear("c", a) + module.linear("d", a) + module.linear("e", b))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (2, 1)


def test_counted_groups_feed_groups(rewrite):
    model = Fan()
    module = rewrite(model, dict.fromkeys("abcde", 0.3))
    for name in "abcde":
        model.get_submodule(name).was_counts = torch.zeros(2, dtype=torch.int64)
    x = torch.randn(1, 3, 12)
    a, b = module.linear("a", x), module.linear("b", x)
    torch.testing.assert_close(module(x), module.linear("c", a) + module.linear("d", a) + module.linear("e", b))
    assert module.targets[sparse_siblings] == 2
    assert module.targets[count_dropped_op] == 5
    for name, seen in {"a": x, "b": x, "c": a, "d": a, "e": b}.items():
        dropped = int((seen.abs() <= module.thresholds[name]).sum())
        assert model.get_submodule(name).was_counts.tolist() == [dropped, 36]


@pytest.mark.parametrize("size", [(1, 1, 12), (1, 4, 12)], ids=str)
def test_input_major_weights_merge_with_each_other(rewrite, size):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Conv1D(12, 12), Conv1D(3, 12), nn.Linear(12, 7)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x)

    module = rewrite(Pair(), {"a": 0.3, "b": 0.6, "c": 0.9})
    x = torch.randn(size)
    for name, y in zip("abc", module(x), strict=True):
        torch.testing.assert_close(y, module.linear(name, x))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (1, 0)
    assert module.targets["t"] == 2
    assert module.context.counts["merged linears"] == 3


def test_one_weight_used_by_two_siblings(rewrite):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x), self.b(x)

    module = rewrite(Twice(), {"a": 0.2, "b": 0.8})
    x = torch.randn(1, 1, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", x))
    assert module.targets[sparse_siblings] == 1


class Computed(nn.Module):
    """Linears a, b and c of one input; `change` gives the arguments of b, some of which it computes."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.c, self.change = *(nn.Linear(12, 12) for _ in range(3)), change

    def forward(self, x):
        a, b = self.a(x), self.b
        weight, bias, threshold = self.change(b.weight, b.bias, b.was_threshold, a)
        return a, sparse_linear(x, weight, bias, threshold, None), self.c(x)


COMPUTED = {
    "bias": (lambda w, b, t, a: (w, torch.tanh(a).sum((0, 1)), t), "its bias is computed in the graph"),
    "cast weight": (lambda w, b, t, a: (w.double().float(), b, t), "its weight is computed in the graph"),
    "scaled weight": (lambda w, b, t, a: (w * 2, b, t), "its weight is computed in the graph"),
    "threshold": (lambda w, b, t, a: (w, b, t * 0.5), "its threshold is computed in the graph"),
    "threshold of the weight": (
        lambda w, b, t, a: (w, b, channel_threshold_op(w, 0.5, 1.0, 1, False)),
        "its threshold is computed in the graph",
    ),
}


@pytest.mark.parametrize(("change", "reason"), COMPUTED.values(), ids=COMPUTED.keys())
def test_what_is_computed_declines_with_a_reason(rewrite, change, reason):
    model = Computed(change)
    module = rewrite(model, dict.fromkeys("abc", 0.4))
    x = torch.randn(1, 3, 12)
    a, b, c = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(c, module.linear("c", x))
    weight, bias, threshold = change(model.b.weight, model.b.bias, model.b.was_threshold, a)
    torch.testing.assert_close(b, F.linear(x.masked_fill(x.abs() <= threshold, 0), weight, bias))
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (1, 1)
    assert [why for _, why in module.context.declined] == [reason]


def test_autocast_casts_weights_and_stays_apart(rewrite):
    class Autocast(Attention):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    module = rewrite(Autocast(), SCHEDULE)
    x = torch.randn(1, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.module(x), rtol=2e-2, atol=2e-2)
    assert (module.targets[sparse_siblings], module.targets[sparse_linear]) == (0, 7)
    assert {reason for _, reason in module.context.declined} == {"its weight is computed in the graph"}


def test_gradients_decline_with_a_reason_and_are_right(rewrite):
    model = Attention(True, True, True)
    module = rewrite(model, SCHEDULE)
    model.requires_grad_(True)
    x = torch.randn(1, 3, 12, requires_grad=True)
    module.compiled(x).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    x.grad = None
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(found, [x.grad, *(parameter.grad for parameter in model.parameters())])
    assert module.targets[sparse_siblings] == 0
    assert module.context.declined == [(name, "it has gradients") for name in SCHEDULE]
    with torch.no_grad():
        module.compiled(x)
    assert module.targets[sparse_siblings] == 2


WRITES = {
    "method": lambda h: h.add_(1.0),
    "function": lambda h: torch.relu_(h),
    "slice": lambda h: h[..., :2].mul_(3.0),
    "setitem": lambda h: h.__setitem__((..., 1), 7.0),
    "inplace": lambda h: F.relu(h, inplace=True),
    "out": lambda h: torch.cos(h * 1, out=h),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_input_written_between_its_readers_declines_with_a_reason(rewrite, write):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            h = torch.sin(x)
            a = self.a(h)
            write(h)
            return a, self.b(h)

    module = rewrite(Written(), {"a": 0.4, "b": 0.4})
    x = torch.randn(1, 3, 12)
    after = torch.sin(x)
    write(after)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", torch.sin(x)))
    torch.testing.assert_close(b, module.linear("b", after))
    assert ("a", "its input is written in place") in module.context.declined
    assert module.context.counts["merged groups"] == 0


def test_write_to_another_tensor_does_not_matter(rewrite):
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.register_buffer("cache", torch.zeros(1, 3, 12))

        def forward(self, x):
            a = self.a(x)
            self.cache.copy_(a)
            return a, self.b(x)

    module = rewrite(Cache(), {"a": 0.4, "b": 0.4})
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", x))
    assert torch.equal(module.module.cache, a)
    assert module.targets[sparse_siblings] == 1

"""Sparse Linears of one input become one call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from was_fx.kernels.linear.sparse_linear import sparse_linear


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
    module = rewrite(Attention(*biases), SCHEDULE, prefill="all")
    x = torch.randn(size)
    torch.testing.assert_close(module(x), expected(module, x))
    assert module.targets[sparse_linear] == 4
    assert module.targets[torch.narrow] == 5
    assert module.context.counts["merged groups"] == 2
    assert module.context.counts["merged linears"] == 5
    assert module.context.counts["sparsified"] == 7


def test_groups_are_reported_with_their_weights_in_the_order_of_the_call(rewrite):
    module = rewrite(Attention(), SCHEDULE, prefill="all")
    module(torch.randn(1, 3, 12))
    context = module.context
    names = [[binding.name for _, binding in group] for group in context.siblings]
    assert names == [["q", "k", "v"], ["gate", "up"]]
    for group in context.siblings:
        assert [context.input_of(weight) for weight, _ in group] == [module.weight(b.name) for _, b in group]
    calls = [node for node in context.module.graph.nodes if node.target is sparse_linear]
    assert [node.meta["was_linear"] for node in calls] == [("q", "k", "v"), "o", ("gate", "up"), "down"]
    merged = {site.name: site.sparse.node for site in context.sites}
    assert merged["q"] is merged["k"] is merged["v"] is calls[0]
    assert merged["gate"] is merged["up"] is calls[2]


def test_dense_tokens_of_a_prompt_stay_dense_in_a_merged_call(rewrite):
    module = rewrite(Attention(), SCHEDULE, prefill="half")
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), expected(module, x, torch.arange(5).expand(2, 5) < 3))
    assert module.targets[sparse_linear] == 4


def test_pass_can_be_left_out(rewrite):
    module = rewrite(Attention(), SCHEDULE, prefill="all", disable=("merge_siblings",))
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), expected(module, x))
    assert module.targets[sparse_linear] == 7
    assert module.targets[torch.narrow] == 0
    assert module.context.siblings == []


def test_unscheduled_sibling_stays_dense_beside_the_merged_call(rewrite):
    module = rewrite(Attention(), {name: SCHEDULE[name] for name in ("q", "v", "up")}, prefill="all")
    x = torch.randn(1, 3, 12)
    h = torch.sin(x)
    mixed = module.linear("q", h) * torch.cat([module.module.k(h), module.linear("v", h)], dim=-1)
    y = x + module.module.o(mixed)
    h = torch.sin(y)
    y = y + module.module.down(F.silu(module.module.gate(h)) * module.linear("up", h))
    torch.testing.assert_close(module(x), y)
    assert module.targets[sparse_linear] == 2
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
    module = rewrite(Fan(), dict.fromkeys("abcde", 0.3), prefill="all")
    x = torch.randn(1, 3, 12)
    a, b = module.linear("a", x), module.linear("b", x)
    torch.testing.assert_close(module(x), module.linear("c", a) + module.linear("d", a) + module.linear("e", b))
    assert module.targets[sparse_linear] == 3


def test_observed_groups_feed_groups(rewrite):
    module = rewrite(Fan(), dict.fromkeys("abcde", 0.3), prefill="all", observe=True)
    x = torch.randn(1, 3, 12)
    a, b = module.linear("a", x), module.linear("b", x)
    torch.testing.assert_close(module(x), module.linear("c", a) + module.linear("d", a) + module.linear("e", b))


@pytest.mark.parametrize("size", [(1, 1, 12), (1, 4, 12)], ids=str)
def test_input_major_weights_merge_with_each_other(rewrite, size):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Conv1D(12, 12), Conv1D(3, 12), nn.Linear(12, 7)

        def forward(self, x):
            x = x.view(-1, 12)
            return torch.addmm(self.a.bias, x, self.a.weight), torch.addmm(self.b.bias, x, self.b.weight), self.c(x)

    module = rewrite(Pair(), {"a": 0.3, "b": 0.6, "c": 0.9}, prefill="all")
    x = torch.randn(size)
    for name, y in zip("abc", module(x), strict=True):
        torch.testing.assert_close(y, module.linear(name, x.view(-1, 12)))
    assert module.targets[sparse_linear] == 1
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

    module = rewrite(Twice(), {"a": 0.2, "b": 0.8}, prefill="all")
    x = torch.randn(1, 1, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", x))
    assert module.targets[sparse_linear] == 1


class ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        a = self.a(x)
        return a + F.linear(x, self.b.weight, torch.tanh(a).sum((0, 1))) + self.c(x)


def test_bias_that_is_computed_declines_with_a_reason(rewrite):
    module = rewrite(ComputedBias(), dict.fromkeys("abc", 0.4), prefill="all")
    x = torch.randn(1, 3, 12)
    a = module.linear("a", x)
    b = module.linear("b", x, bias=False) + torch.tanh(a).sum((0, 1))
    torch.testing.assert_close(module(x), a + b + module.linear("c", x))
    assert module.targets[sparse_linear] == 2
    assert ("b", "its bias is computed in the graph") in module.context.declined


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

    module = rewrite(Written(), {"a": 0.4, "b": 0.4}, prefill="all")
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

    module = rewrite(Cache(), {"a": 0.4, "b": 0.4}, prefill="all")
    x = torch.randn(1, 3, 12)
    a, b = module(x)
    torch.testing.assert_close(a, module.linear("a", x))
    torch.testing.assert_close(b, module.linear("b", x))
    assert torch.equal(module.module.cache, a)
    assert module.targets[sparse_linear] == 1

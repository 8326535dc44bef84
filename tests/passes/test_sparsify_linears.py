"""Linears become sparse, in a decode step and in the part of a prompt that the option `prefill` names."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from was_fx.kernels.linear.sparse_linear import sparse_linear
from was_fx.passes.graph.errors import RewriteError

LINEAR = torch._C._nn.linear
DENSE_TOKENS = {"sparse": lambda s: math.ceil(s / 100), "half": lambda s: math.ceil(s / 2), "all": lambda s: 0}


class Block(nn.Module):
    """Linears on whole and on flattened sequences, and a head that sees the last `last` tokens."""

    def __init__(self, last=None):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 10), nn.Linear(10, 12, bias=False), nn.Linear(12, 7)
        self.last = last

    def forward(self, x):
        h = torch.sin(self.a(x))
        y = torch.sin(self.b(h.reshape(-1, 10))).view(x.shape)
        return self.head(y if self.last is None else y[:, -self.last :])


SCHEDULE = {"a": 0.7, "b": 0.4, "head": 0.3}


def expected(module, x, dense):
    h = torch.sin(module.linear("a", x, dense))
    y = torch.sin(module.linear("b", h, dense))
    last = module.module.last
    return module.linear("head", y, dense) if last is None else module.linear("head", y[:, -last:])


@pytest.mark.parametrize("prefill", DENSE_TOKENS)
@pytest.mark.parametrize("length", [2, 101, 200])
@pytest.mark.parametrize("batch", [1, 3])
def test_leading_share_of_a_prompt_stays_dense(rewrite, prefill, length, batch):
    module = rewrite(Block(), SCHEDULE, prefill=prefill)
    x = torch.randn(batch, length, 12)
    dense = torch.arange(length).expand(batch, length) < DENSE_TOKENS[prefill](length)
    torch.testing.assert_close(module(x), expected(module, x, dense))
    assert module.context.counts["sparsified"] == 3
    assert LINEAR not in module.targets


@pytest.mark.parametrize("prefill", DENSE_TOKENS)
def test_one_graph_serves_every_length_of_prompt(rewrite, prefill):
    module = rewrite(Block(), SCHEDULE, prefill=prefill, dynamic=True)
    for batch, length in ((2, 5), (2, 201), (4, 100), (2, 2)):
        x = torch.randn(batch, length, 12)
        dense = torch.arange(length).expand(batch, length) < DENSE_TOKENS[prefill](length)
        torch.testing.assert_close(module(x), expected(module, x, dense))
    assert len(module.contexts) == 1


@pytest.mark.parametrize("prefill", DENSE_TOKENS)
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("dynamic", [None, True])
def test_head_that_sees_the_last_tokens_only_is_sparse(rewrite, prefill, last, dynamic):
    module = rewrite(Block(last), SCHEDULE, prefill=prefill, dynamic=dynamic)
    x = torch.randn(2, 7, 12)
    dense = torch.arange(7).expand(2, 7) < DENSE_TOKENS[prefill](7)
    torch.testing.assert_close(module(x), expected(module, x, dense))


@pytest.mark.parametrize("prefill", ["dense", *DENSE_TOKENS])
@pytest.mark.parametrize("batch", [1, 4])
def test_decode_is_sparse_whatever_prompts_are(rewrite, prefill, batch):
    module = rewrite(Block(), SCHEDULE, prefill=prefill)
    x = torch.randn(batch, 1, 12)
    torch.testing.assert_close(module(x), expected(module, x, None))
    sparse = [node for node in module.context.module.graph.nodes if node.target is sparse_linear]
    assert [node.args[4:] for node in sparse] == [(1, 0)] * 3


def test_dense_prompt_is_the_graph_as_it_was(rewrite):
    module = rewrite(Block(), SCHEDULE, prefill="dense")
    x = torch.randn(1, 5, 12)
    assert torch.equal(module(x), module.module(x))
    assert module.targets[sparse_linear] == 0
    assert module.targets[LINEAR] == 3
    assert module.context.extra == {}
    assert module.context.counts["dense (prompt)"] == 3
    assert module.context.declined == [(name, "prompts stay dense") for name in SCHEDULE]


def test_unscheduled_linear_stays_dense_and_is_counted(rewrite):
    module = rewrite(Block(), {"a": 0.7}, prefill="all")
    x = torch.randn(1, 5, 12)
    h = torch.sin(module.linear("a", x))
    torch.testing.assert_close(module(x), module.module.head(torch.sin(module.module.b(h))))
    assert (module.targets[sparse_linear], module.targets[LINEAR]) == (1, 2)
    assert {("b", "not in the schedule"), ("head", "not in the schedule")} <= set(module.context.declined)
    assert module.context.counts["dense (not scheduled)"] == 2


@pytest.mark.parametrize(("threshold", "result"), [(0.0, "dense"), (math.inf, "bias")])
def test_extreme_thresholds(rewrite, threshold, result):
    module = rewrite(nn.Linear(12, 10), {"": torch.full((12,), threshold)}, prefill="all")
    x = torch.randn(1, 5, 12)
    y = module.module(x) if result == "dense" else module.module.bias.expand(1, 5, 10)
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("prefill", ["dense", *DENSE_TOKENS])
@pytest.mark.parametrize("length", [1, 6])
def test_linear_may_feed_a_linear(rewrite, prefill, length):
    module = rewrite(nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)]), {"0": 0.5, "2": 0.1}, prefill=prefill)
    x = torch.randn(2, length, 12)
    y = module(x)
    if prefill == "dense" and length > 1:
        assert torch.equal(y, module.module(x))
        return
    dense = torch.arange(length).expand(2, length) < (DENSE_TOKENS[prefill](length) if length > 1 else 0)
    torch.testing.assert_close(y, module.linear("2", module.module[1](module.linear("0", x, dense)), dense))


def test_linear_may_make_the_bias_of_another(rewrite):
    class Generated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 10), nn.Linear(12, 10)

        def forward(self, x):
            return F.linear(x, self.a.weight, self.b(x[0, 0]))

    module = rewrite(Generated(), {"a": 0.5, "b": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", x, bias=False) + module.linear("b", x[0, 0]))
    assert module.targets[sparse_linear] == 2


def test_linear_called_twice_has_one_threshold(rewrite):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 12)

        def forward(self, x):
            return self.a(torch.sin(self.a(x)))

    module = rewrite(Again(), {"a": 0.5}, prefill="all")
    x = torch.randn(1, 3, 12)
    torch.testing.assert_close(module(x), module.linear("a", torch.sin(module.linear("a", x))))
    assert module.targets[sparse_linear] == 2
    assert len(module.context.extra) == 1


@pytest.mark.parametrize("prefill", ["sparse", "half"])
@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.flatten(0, 1)[:],  # flat, and not seen from what
        lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),  # one row for each head
        lambda x: x[:, -1],  # the last token of each sequence
    ],
)
def test_tokens_that_cannot_be_told_apart_are_an_error(rewrite, prefill, reshape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 10)

        def forward(self, x):
            return self.a(reshape(x))

    module = rewrite(Net(), {"a": 0.5}, prefill=prefill)
    with pytest.raises(BackendCompilerFailed, match="a: can't tell the sequences of its input") as caught:
        module(torch.randn(2, 5, 12))
    assert type(caught.value.inner_exception) is RewriteError
    assert "use prefill='dense' or 'all'" in str(caught.value)


@pytest.mark.parametrize("prefill", ["sparse", "half"])
def test_rows_that_are_not_all_tokens_are_an_error_beside_whole_sequences(rewrite, prefill):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.expert = nn.Linear(12, 12), nn.Linear(12, 10)

        def forward(self, x):
            return self.expert(torch.sin(self.a(x))[:, 2:].reshape(-1, 12) * 2)

    module = rewrite(Routed(), {"a": 0.5, "expert": 0.5}, prefill=prefill)
    with pytest.raises(BackendCompilerFailed, match=r"expert: can't tell the sequences of its input \(6, 12\) apart"):
        module(torch.randn(2, 5, 12))


def test_flattened_rows_of_all_tokens_take_the_sequences_seen_elsewhere(rewrite):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 10)

        def forward(self, x):
            return self.b(F.layer_norm(torch.sin(self.a(x)).reshape(-1, 12), (12,)))

    module = rewrite(Flat(), {"a": 0.5, "b": 0.5}, prefill="half")
    x = torch.randn(2, 5, 12)
    dense = torch.arange(5).expand(2, 5) < 3
    h = F.layer_norm(torch.sin(module.linear("a", x, dense)), (12,))
    torch.testing.assert_close(module(x), module.linear("b", h, dense).view(10, 10))


def test_autocast_is_an_error_that_names_every_linear(rewrite):
    class Autocast(Block):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    module = rewrite(Autocast(), SCHEDULE, prefill="all")
    with pytest.raises(BackendCompilerFailed) as caught:
        module(torch.randn(1, 3, 12))
    message = str(caught.value.inner_exception)
    assert type(caught.value.inner_exception) is RewriteError
    assert "a: autocast makes its output torch.bfloat16 from torch.float32" in message
    assert "b: x is torch.bfloat16 and its weight torch.float32" in message
    assert "run the model in one dtype" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_other_dtypes(rewrite, dtype, length):
    module = rewrite(Block().to(dtype), SCHEDULE, prefill="all")
    x = torch.randn(2, length, 12, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(module, x, None), rtol=2e-2, atol=2e-2)


def test_pass_can_be_left_out(rewrite):
    module = rewrite(Block(), SCHEDULE, prefill="all", disable=("sparsify_linears",))
    x = torch.randn(1, 3, 12)
    assert torch.equal(module(x), module.module(x))
    assert module.targets[sparse_linear] == 0

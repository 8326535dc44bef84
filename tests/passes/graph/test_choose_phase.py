"""Decode or prefill by the number of new tokens for each sequence."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """Two Linears over x as `shape` makes it, and a head that sees as much of the result as `last` leaves."""

    def __init__(self, shape=lambda x: x, last=lambda x: x):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)
        self.shape, self.last = shape, last

    def forward(self, x):
        h = torch.sin(self.a(self.shape(x)))
        return self.head(self.last(torch.sin(self.b(h)).view_as(x)))


def flat(x):
    return x.view(-1, 12)


@pytest.mark.parametrize(
    ("net", "size", "phase"),
    [
        (Net(), (1, 1, 12), "decode"),
        (Net(), (4, 1, 12), "decode"),
        (Net(), (1, 12), "decode"),
        (Net(), (12,), "decode"),
        (Net(), (1, 5, 12), "prefill"),
        (Net(), (4, 5, 12), "prefill"),
        (Net(), (5, 12), "prefill"),
        (Net(flat), (1, 1, 12), "decode"),
        (Net(flat), (4, 1, 12), "decode"),
        (Net(flat), (1, 5, 12), "prefill"),
        (Net(lambda x: x.reshape(-1, 12).contiguous().to(x.dtype)), (4, 1, 12), "decode"),
        (Net(lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1)[:, 0]), (4, 1, 12), "decode"),
        (Net(last=lambda x: x[:, -1:]), (1, 5, 12), "prefill"),
        (Net(last=lambda x: x[:, -1]), (1, 5, 12), "prefill"),
        (Net(last=lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1)), (4, 1, 12), "decode"),  # one row for each head
        (Net(last=lambda x: x.expand(-1, 5, -1)), (1, 1, 12), "decode"),  # a Linear that reads all cached tokens
    ],
)
def test_phase(rewrite, net, size, phase):
    module = rewrite(net, {"a": 0.5, "b": 0.5})
    module(torch.randn(size))
    assert module.context.phase == phase
    assert (module.context.counts["decode"], module.context.counts["prefill"]) == (
        phase == "decode",
        phase == "prefill",
    )
    assert module.context.counts["sparsified"] == (2 if phase == "decode" else 0)


def test_symbolic_length_is_a_prompt_and_length_one_a_graph_of_its_own(rewrite):
    module = rewrite(Net(), {"a": 0.5}, dynamic=True)
    for length in (5, 9, 1, 6):
        module(torch.randn(1, length, 12))
    assert [context.phase for context in module.contexts] == ["prefill", "decode"]


def test_symbolic_batch_of_single_tokens_is_decode(rewrite):
    module = rewrite(Net(), {"a": 0.5}, dynamic=True)
    for batch in (3, 8):
        module(torch.randn(batch, 1, 12))
    assert [context.phase for context in module.contexts] == ["decode"]

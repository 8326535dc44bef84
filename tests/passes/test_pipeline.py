"""The passes as a whole."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from was_fx.passes.pipeline import PIPELINE

OPTIONAL = [
    "sparsify_linears",
    "count_dropped",
    "merge_siblings",
    "list_channels",
    "fuse_attention",
    "fuse_rms_norms",
    "fuse_gated_products",
    "batch_counters",
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_order():
    assert [each.__name__ for each in PIPELINE] == ["recognize_linears", "choose_phase", *OPTIONAL]


def test_every_pass_says_what_it_does():
    assert all(each.__doc__ for each in PIPELINE)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_pass_can_be_disabled(rewrite, name):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all", disable=(name,))
    x = torch.randn(1, 3, 12)
    dense = name == "sparsify_linears"
    y = module.module(x) if dense else module.linear("a", x) + module.linear("b", x)
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize("name", ["recognize_linears", "choose_phase", "merge", "", "Merge_siblings"])
def test_any_other_name_is_an_error_that_lists_the_optional_passes(rewrite, name):
    module = rewrite(Net(), {"a": 0.5}, disable=(name, "merge_siblings"))
    with pytest.raises(BackendCompilerFailed) as caught:
        module(torch.randn(1, 3, 12))
    assert type(caught.value.inner_exception) is ValueError
    expected = f"disable names {name}; the passes to choose from are {', '.join(OPTIONAL)}"
    assert str(caught.value.inner_exception) == expected


def test_counts_of_every_pass(rewrite, caplog):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all", observe=True)
    with caplog.at_level(logging.INFO, logger="was_fx.passes.pipeline"):
        module(torch.randn(1, 3, 12))
    counts = {
        "linears": 2,
        "scheduled": 2,
        "prefill": 1,
        "sparsified": 2,
        "observed": 2,
        "merged groups": 1,
        "merged linears": 2,
    }
    assert dict(module.context.counts) == counts
    assert [record.getMessage() for record in caplog.records if record.name == "was_fx.passes.pipeline"] == [
        f"passes: {counts}"
    ]


def test_generated_code_is_that_of_the_graph(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, prefill="all")
    module(torch.randn(1, 3, 12))
    assert "was.sparse_linear" in module.context.module.code
    assert "linear(l_" not in module.context.module.code

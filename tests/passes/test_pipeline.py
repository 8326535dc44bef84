"""The passes as a whole."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from was_fx.kernels.linear.sparse_linear import sparse_linear, sparse_siblings
from was_fx.passes import pipeline
from was_fx.passes.pipeline import OPTIONAL, REQUIRED, check_disabled

NAMES = [
    "merge_siblings",
    "list_channels",
    "list_expert_channels",
    "fuse_routers",
    "replace_topk",
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
    assert [each.__name__ for each in REQUIRED] == ["insert", "find_sparse_calls"]
    assert [each.__name__ for each in OPTIONAL] == NAMES


def test_every_pass_says_what_it_does():
    assert all(each.__doc__ for each in (*REQUIRED, *OPTIONAL))


class Step(nn.Module):
    """A block of a model in its decode step: norms, attention over a cache that it fills, a gated product, counters."""

    def __init__(self, width=24, heads=2, length=6):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias) for bias in (True, False, True, False))
        self.gate, self.up, self.down = nn.Linear(width, 40, False), nn.Linear(width, 40, False), nn.Linear(40, width)
        self.norm, self.heads = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(2)), heads
        self.register_buffer("keys", torch.randn(1, heads, length, width // heads))
        self.register_buffer("values", torch.randn(1, heads, length, width // heads))
        for name in ("keys_length", "values_length"):
            self.register_buffer(name, torch.tensor(2))

    def forward(self, x):
        n = self.norm[0](x)
        q, k, v = (each(n).view(1, 1, self.heads, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        place = torch.arange(1) + self.keys_length
        self.keys.index_copy_(2, place, k)
        self.values.index_copy_(2, place, v)
        self.keys_length.add_(1)
        self.values_length.add_(1)
        mask = torch.arange(self.keys.shape[2])[None, None, None] <= place
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        h = x + self.o(y.transpose(1, 2).reshape(1, 1, -1))
        n = self.norm[1](h)
        return h + self.down(F.silu(self.gate(n)) * self.up(n))


SCHEDULE = {"q": 0.3, "k": 0.4, "v": 0.5, "o": 0.05, "gate": 0.4, "up": 0.6, "down": 0.05}
DISABLED = [(), *[(name,) for name in NAMES], tuple(NAMES), *itertools.combinations(NAMES[:4], 2), tuple(NAMES[1:])]


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("disable", DISABLED, ids=lambda names: "+".join(names) or "none")
@pytest.mark.usefixtures("meanings")
def test_passes_may_be_left_out_and_the_numbers_are_the_same(rewrite, disable, lists):
    torch.manual_seed(0)
    plain, passed = Step(), Step()
    passed.load_state_dict(plain.state_dict())
    expected = rewrite(plain, SCHEDULE, disable=tuple(NAMES))
    module = rewrite(passed, dict(expected.thresholds), disable=disable, lists=lists)
    for _ in range(3):
        x = torch.randn(1, 1, 24)
        with torch.no_grad():
            torch.testing.assert_close(module(x), plain(x))  # eager
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(passed.get_buffer(name), buffer)
    done = module.context.counts
    whole = module.targets[sparse_linear], module.targets[sparse_siblings]
    if lists and "list_channels" not in disable:
        assert (done["listed"], whole) == (7, (0, 0))
    else:
        assert whole == ((7, 0) if "merge_siblings" in disable else (2, 2))
    fused = lists and "list_channels" not in disable
    assert (done["merged groups"] > 0) == ("merge_siblings" not in disable)
    for name, count in {
        "fuse_attention": "decode attention",
        "fuse_rms_norms": "fused norms",
        "batch_counters": "batched counters",
    }.items():
        lone = name == "fuse_rms_norms" and "merge_siblings" in disable  # several lists of one norm
        assert lone or (done[count] > 0) == (fused and name not in disable), name


@pytest.mark.parametrize("name", ["insert", "find_sparse_calls", "merge", "", "Merge_siblings", "sparsify_linears"])
def test_any_other_name_is_an_error_that_lists_the_optional_passes(rewrite, name):
    expected = f"disable names {name}; the passes to choose from are {', '.join(NAMES)}"
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_disabled((name, "merge_siblings"))
    assert str(refused.value) == expected
    module = rewrite(Net(), {"a": 0.5}, disable=(name, "merge_siblings"))
    with pytest.raises(BackendCompilerFailed) as caught:
        module(torch.randn(1, 3, 12))
    assert type(caught.value.inner_exception) is ValueError
    assert str(caught.value.inner_exception) == expected


def test_all_unknown_names_are_told():
    with pytest.raises(ValueError, match="disable names a, b; the passes to choose from are merge_siblings, "):
        check_disabled(("b", "merge_siblings", "a", "b"))
    check_disabled(())
    check_disabled(NAMES)


def test_counts_of_every_pass(rewrite, caplog):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5})
    with caplog.at_level(logging.INFO, logger="was_fx.passes.pipeline"):
        module(torch.randn(1, 3, 12))
    counts = {"sparse": 2, "merged groups": 1, "merged linears": 2}
    assert dict(module.context.counts) == counts
    assert [record.getMessage() for record in caplog.records if record.name == "was_fx.passes.pipeline"] == [
        f"passes: {counts}"
    ]


def test_observers_see_every_context(rewrite, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "observers", [seen.append])
    module = rewrite(Net(), {"a": 0.5, "b": 0.5})
    module(torch.randn(1, 3, 12))
    module(torch.randn(1, 1, 12))
    assert seen == module.contexts
    assert len(seen) == 2


def test_generated_code_is_that_of_the_graph(rewrite):
    module = rewrite(Net(), {"a": 0.5, "b": 0.5}, insert=True)
    module(torch.randn(1, 3, 12))
    assert "was.sparse_linear" in module.context.module.code
    assert "linear(l_" not in module.context.module.code.replace("sparse_linear", "")

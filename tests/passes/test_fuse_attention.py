"""Attention of one query runs in one op, which lists its output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.decode_attention import decode_attention_op
from was_fx.kernels.parts.arrivals import arrivals_op
from was_fx.passes.graph.matching import kind

SDPA = F.scaled_dot_product_attention
SCHEDULE = {"q": 0.4, "o": 0.02}
L, D = 9, 8


def repeated(k, n):
    batch, shared, length, width = k.shape
    return k[:, :, None, :, :].expand(batch, shared, n, length, width).reshape(batch, shared * n, length, width)


class Attention(nn.Module):
    """q from a Linear, `attend` over given keys and values, and o behind it."""

    def __init__(self, attend, heads=4, width=D, repeat=True):
        super().__init__()
        self.heads, self.width, self.repeat, self.attend = heads, width, repeat, attend
        self.q, self.o = nn.Linear(12, heads * width), nn.Linear(heads * width, 12)

    def forward(self, x, k, v, *mask):
        q = self.q(x).view(1, x.shape[1], self.heads, self.width).transpose(1, 2)
        if self.repeat:
            k, v = (repeated(each, self.heads // each.shape[1]) for each in (k, v))
        y = self.attend(q, k, v, *mask)
        return self.o(y.transpose(1, 2).reshape(1, x.shape[1], -1))


def inputs(*mask, tokens=1, shared=2, width=D, length=L):
    return torch.randn(1, tokens, 12), *(torch.randn(1, shared, length, width) for _ in "kv"), *mask


def attention_node(module):
    (node,) = [each for each in module.context.module.graph.nodes if each.target is decode_attention_op]
    return node


MASK = torch.arange(L).view(1, 1, 1, L) < 5
CAUSAL = "attention with dropout, or causal by position"
BAD_MASK = "a mask that is not [B, 1, 1, L] bool"

ROWS = {
    "no mask": (lambda q, k, v: SDPA(q, k, v), (), None),
    "scale": (lambda q, k, v: SDPA(q, k, v, scale=0.7), (), None),
    "mask": (lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), (MASK,), None),
    "mask by position": (lambda q, k, v, m: SDPA(q, k, v, m), (MASK,), None),
    "window": (lambda q, k, v, m: SDPA(q, k, v, m & m.roll(2, -1)), (MASK,), None),
    "float mask": (lambda q, k, v, m: SDPA(q, k, v, m.float()), (MASK,), BAD_MASK),
    "mask of a head each": (lambda q, k, v, m: SDPA(q, k, v, m.expand(1, 4, 1, L)), (MASK,), BAD_MASK),
    "mask of few dimensions": (lambda q, k, v, m: SDPA(q, k, v, m[0, 0]), (MASK,), BAD_MASK),
    "one mask for all keys": (lambda q, k, v, m: SDPA(q, k, v, m[..., :1]), (MASK,), BAD_MASK),
    "causal": (lambda q, k, v: SDPA(q, k[:, :, :1], v[:, :, :1], is_causal=True), (), CAUSAL),
    "wide values": (
        lambda q, k, v: SDPA(q, k, torch.cat([v, v], -1))[..., :D],
        (),
        "keys and values of different width",
    ),
    "several queries": (
        lambda q, k, v: SDPA(q.expand(1, 4, 3, D), k, v)[:, :, :1],
        (),
        "more than one query",
    ),
    "no batch": (lambda q, k, v: SDPA(q[0], k[0], v[0])[None], (), "more than one query"),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_fused_and_what_is_left_alone_with_a_reason(listed, name):
    attend, mask, reason = ROWS[name]
    module = listed(Attention(attend), SCHEDULE, *inputs(*mask))
    assert module.context.counts["decode attention"] == module.context.counts["fused attention lists"] == (not reason)
    assert module.targets[compact_op] == (2 if reason else 1)
    assert module.targets[SDPA] == (1 if reason else 0)
    assert reason is None or reason in [why for _, why in module.context.declined]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1), (3, 1)])
@pytest.mark.parametrize("grouped", [False, True])
def test_keys_are_shared_without_a_copy(listed, heads, shared, grouped):
    model = Attention(lambda q, k, v: SDPA(q, k, v, enable_gqa=grouped), heads, repeat=not grouped)
    module = listed(model, SCHEDULE, *inputs(shared=shared))
    assert attention_node(module).args[1].meta["example_value"].shape[1] == shared
    assert module.targets["expand"] == 0


@pytest.mark.parametrize(
    ("expand", "base"),
    [
        (lambda m: m.expand(1, -1, 1, L), True),
        (lambda m: m.expand(1, 1, 1, L).expand(-1, -1, -1, -1), True),
        (lambda m: m[0].expand(1, 1, 1, L), False),  # of fewer dimensions
    ],
)
def test_blocks_share_a_mask_that_is_expanded_to_its_own_shape(listed, expand, base):
    module = listed(Attention(lambda q, k, v, m: SDPA(q, k, v, attn_mask=expand(m & True))), SCHEDULE, *inputs(MASK))
    assert (kind(attention_node(module).args[3]) == "expand") != base
    assert torch.Tag.flexible_layout in decode_attention_op.tags  # or Inductor stores it anew for every block


def test_repetition_by_copies_is_read_as_it_is(listed):
    model = Attention(lambda q, k, v: SDPA(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), repeat=False)
    module = listed(model, SCHEDULE, *inputs())
    assert attention_node(module).args[1].meta["example_value"].shape[1] == 4


def test_heads_too_wide_are_left_alone(listed):
    module = listed(Attention(SDPA, 1, 300), SCHEDULE, *inputs(shared=1, width=300))
    assert "heads wider than 256" in [why for _, why in module.context.declined]


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 2.0,
        lambda y: y.flip(1),
        lambda y: y.transpose(1, 3).reshape(1, 4, 1, D),  # other order of channels
    ],
)
def test_output_that_changes_before_the_linear_is_listed_by_itself(listed, change):
    module = listed(Attention(lambda q, k, v: change(SDPA(q, k, v))), SCHEDULE, *inputs())
    assert module.context.counts["decode attention"] == 1
    assert module.context.counts["fused attention lists"] == 0
    assert module.targets[compact_op] == 2
    assert attention_node(module).args[5] == []


def test_output_written_in_place_is_listed_by_itself(listed):
    def attend(q, k, v):
        y = SDPA(q, k, v)
        y.mul_(2.0)
        return y

    module = listed(Attention(attend), SCHEDULE, *inputs())
    assert module.context.counts["fused attention lists"] == 0


def test_one_graph_serves_every_length_of_cache(listed):
    model = Attention(lambda q, k, v, m: SDPA(q, k, v, m))
    module = listed(model, SCHEDULE, *inputs(MASK), dynamic=True)
    x, k, v = inputs(length=30)
    mask = torch.arange(30).view(1, 1, 1, 30) < 20
    longer = module(x, k, v, mask)
    shorter = module(x, *(torch.cat([each]) for each in (k[:, :, :20], v[:, :, :20], mask[..., :20])))
    torch.testing.assert_close(longer, shorter)
    assert len(module.contexts) == 1
    assert module.context.counts["decode attention"] == 1


def test_all_attention_of_a_graph_shares_counters(listed):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(SDPA), Attention(SDPA)

        def forward(self, x, k, v):
            return self.second(self.first(x, k, v), k, v)

    schedule = {f"{block}.{name}": limit for block in ("first", "second") for name, limit in SCHEDULE.items()}
    module = listed(Twice(), schedule, *inputs())
    nodes = list(module.context.module.graph.nodes)
    (counters,) = [node for node in nodes if node.target is arrivals_op]
    calls = [node for node in nodes if node.target is decode_attention_op]
    assert [call.args[6] for call in calls] == [counters, counters]


def test_without_listed_channels_attention_stays(rewrite):
    module = rewrite(Attention(SDPA), SCHEDULE, lists=False)
    module(*inputs())
    assert (module.targets[SDPA], module.targets[decode_attention_op]) == (1, 0)


def test_pass_can_be_left_out(listed):
    module = listed(Attention(SDPA), SCHEDULE, *inputs(), disable=("fuse_attention",))
    assert (module.targets[SDPA], module.targets[compact_op]) == (1, 2)


def test_attention_of_sizes_that_are_not_known_is_listed_by_itself(listed):
    """As behind a cut in the graph, where a cache is updated that Dynamo can't trace."""

    class Rest(nn.Module):
        def __init__(self):
            super().__init__()
            self.o = nn.Linear(4 * D, 12)

        def forward(self, q, k, v):
            return self.o(SDPA(q, k, v).transpose(1, 2).reshape(1, 1, -1))

    q, k, v = torch.randn(1, 4, 1, D), torch.randn(1, 4, L, D), torch.randn(1, 4, L, D)
    module = listed(Rest(), {"o": 0.02}, q, k, v, dynamic=True)
    assert module.context.counts["decode attention"] == 1
    assert module.context.counts["fused attention lists"] == 0

"""RMSNorms list their output, in whichever of the usual ways they are written."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from was_fx.kernels.ops.compact import compact_op
from was_fx.kernels.ops.rms_norm_compact import rms_norm_compact_op

K = 12


class Written(nn.Module):
    """A norm as its `formula`."""

    def __init__(self, formula):
        super().__init__()
        self.weight, self.formula = nn.Parameter(torch.rand(K) + 0.5), formula

    def forward(self, h):
        return self.formula(h, self.weight)


def standard(h, eps=1e-6, dim=-1):
    h32 = h.float()
    return h32 * torch.rsqrt(h32.pow(2).mean(dim, keepdim=True) + eps)


class Block(nn.Module):
    """residual + o(x), a norm, and two Linears that read it."""

    def __init__(self, norm, *, bias=False, flipped=False, dtype=torch.float32):
        super().__init__()
        self.o, self.norm = nn.Linear(8, K, bias), norm
        self.a, self.b = nn.Linear(K, 5), nn.Linear(K, 7)
        self.flipped = flipped
        for parameter in norm.parameters():
            parameter.data.add_(torch.rand(K) / 4)
        self.to(dtype)

    def forward(self, residual, x):
        o = self.o(x)
        h = o + residual if self.flipped else residual + o
        n = self.norm(h)
        return self.a(n), self.b(n), h


SCHEDULE = {"o": 0.4, "a": 0.4, "b": 0.6}


def inputs(dtype=torch.float32):
    return torch.randn(1, 1, K, dtype=dtype), torch.randn(1, 1, 8, dtype=dtype)


def norms(module):
    return [node for node in module.context.module.graph.nodes if node.target is rms_norm_compact_op]


STYLES = {
    "Llama": (lambda: LlamaRMSNorm(K), "cast_first"),
    "OLMo 2": (lambda: Olmo2RMSNorm(K), "cast_last"),
    "Gemma": (lambda: GemmaRMSNorm(K), "unit_offset"),
    "torch": (lambda: nn.RMSNorm(K, eps=1e-6), "cast_last"),
    "square": (
        lambda: Written(
            lambda h, w: w * (h.float() * torch.rsqrt((h.float() * 1).square().mean(-1, True) + 1e-6)).to(h)
        ),
        None,
    ),
    "flipped": (lambda: Written(lambda h, w: standard(h).to(h.dtype) * w), "cast_first"),
    "keywords": (
        lambda: Written(lambda h, w: torch.rms_norm(input=h, normalized_shape=(K,), weight=w, eps=1e-6)),
        "cast_last",
    ),
}


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_fused_with_the_linear_before_and_its_listing(listed, name, dtype):
    make, style = STYLES[name]
    module = listed(Block(make(), dtype=dtype), SCHEDULE, *inputs(dtype))
    if style is None:
        assert norms(module) == []
        return
    (node,) = norms(module)
    if dtype == torch.bfloat16:  # in fp32 nothing is rounded, and styles are one
        assert node.args[6] == style
    assert module.context.counts["fused norms"] == 1
    assert node.args[1] is not None
    assert module.targets[compact_op] == 1  # that of o
    assert "rsqrt" not in {str(target) for target in module.targets}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_residual_is_added_in_either_order_and_with_the_bias(listed, bias, flipped):
    module = listed(Block(LlamaRMSNorm(K), bias=bias, flipped=flipped), SCHEDULE, *inputs())
    (node,) = norms(module)
    assert (node.args[2] is not None) == bias


class Around(Block):
    """What `change` makes of the block: (module, residual, x) -> outputs."""

    def __init__(self, change, norm=None, **options):
        super().__init__(norm or LlamaRMSNorm(K), **options)
        self.change = change

    def forward(self, residual, x):
        return self.change(self, residual, x)


def narrow_residual(m, r, x):
    n = m.norm(r + torch.sin(m.o(x)))
    return m.a(n), m.b(n)


def read_elsewhere(m, r, x):
    h = r + m.o(x)
    n = m.norm(h)
    return m.a(n), m.b(n), torch.sin(n), h * 2


def scaled(m, r, x):
    n = m.norm(torch.add(r, m.o(x), alpha=2.0))
    return m.a(n), m.b(n)


def half_of_a_linear(m, r, x):
    n = m.norm(r + m.o(torch.cat([x, x], -1)[..., :8]))
    return m.a(n)


def first_norm(m, r, x):
    n = m.norm(r)
    return m.a(n), m.b(n), m.o(x)


def two_norms(m, r, x):
    h = r + m.o(x)
    n = m.norm(h)
    h = h + torch.cat([m.a(n), m.b(n)], -1)
    n = m.norm(h)
    return m.a(n), m.b(n)


def written_h(m, r, x):
    h = r + m.o(x)
    n = m.norm(h)
    h.mul_(2)
    return m.a(n), m.b(n), h


def written_norm(m, r, x):
    n = m.norm(r + m.o(x))
    n.add_(0.5)
    return m.a(n), m.b(n)


def written_part(m, r, x):
    o = m.o(x)
    o.mul_(2)
    n = m.norm(r + o)
    return m.a(n), m.b(n)


WRITTEN = "it is written in place"
ROUNDS = "the norm rounds in another place"
PARAMETER = "the norm's weight is not a parameter [K]"
NO_NORM = "its input is not an RMSNorm"


# (change, norm, dtype) -> (norms fused, of them with the Linear before, reason)
@pytest.mark.parametrize(
    ("change", "fused", "added", "reason"),
    [
        (narrow_residual, 1, 0, None),
        (read_elsewhere, 1, 1, None),
        (scaled, 1, 0, None),
        (half_of_a_linear, 1, 1, None),
        (first_norm, 1, 0, None),
        (two_norms, 2, 1, None),
        (written_part, 1, 0, None),
        (written_h, 0, 0, WRITTEN),
        (written_norm, 0, 0, WRITTEN),
    ],
)
def test_what_surrounds_a_norm(listed, change, fused, added, reason):
    names = ("o", "a") if change is half_of_a_linear else SCHEDULE
    module = listed(Around(change), {name: SCHEDULE[name] for name in names}, *inputs())
    assert module.context.counts["fused norms"] == fused
    assert sum(node.args[1] is not None for node in norms(module)) == added
    assert reason is None or reason in [why for _, why in module.context.declined]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.LayerNorm(K), NO_NORM),
        (lambda: nn.RMSNorm(K, elementwise_affine=False, eps=1e-6), "rms_norm without a weight or eps"),
        (lambda: nn.RMSNorm(K), "rms_norm without a weight or eps"),
        (lambda: Written(lambda h, w: torch.rms_norm(h, (K,), w * 2, 1e-6)), PARAMETER),
        (lambda: Written(lambda h, w: (w * 2) * standard(h).to(h.dtype)), PARAMETER),
        (lambda: Written(lambda h, w: w[:1] * standard(h).to(h.dtype)), PARAMETER),
        (lambda: Written(lambda h, w: (1.0 + w) * standard(h).to(h.dtype)), ROUNDS),
        (lambda: Written(lambda h, w: ((1.0 + w).float() * standard(h)).to(h.dtype)), ROUNDS),
        (lambda: Written(lambda h, w: w * standard(h, dim=(-1, -2)).to(h.dtype)), NO_NORM),
        (lambda: Written(lambda h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))), NO_NORM),
        (
            lambda: Written(
                lambda h, w: w * (h.float() * torch.rsqrt(h.float().pow(3).mean(-1, True) ** 2 + 1e-6)).to(h)
            ),
            NO_NORM,
        ),
    ],
)
def test_other_norms_are_left_alone_with_a_reason(listed, norm, reason):
    module = listed(Block(norm(), dtype=torch.bfloat16), SCHEDULE, *inputs(torch.bfloat16))
    assert norms(module) == []
    assert module.context.counts["fused norms"] == 0
    assert reason in [why for _, why in module.context.declined]


def test_more_siblings_than_a_call_takes(listed):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linears = LlamaRMSNorm(K), nn.ModuleList(nn.Linear(K, 3) for _ in range(6))

        def forward(self, h):
            n = self.norm(h)
            return [linear(n) for linear in self.linears]

    module = listed(Wide(), {f"linears.{i}": 0.1 * i for i in range(6)}, torch.randn(1, 1, K))
    assert (module.context.counts["fused norms"], module.targets[compact_op]) == (1, 1)


def test_pass_can_be_left_out(listed):
    module = listed(Block(LlamaRMSNorm(K)), SCHEDULE, *inputs(), disable=("fuse_rms_norms",))
    assert norms(module) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_is_not_listed_adds_the_linear_before(listed, dtype):
    norm = Written(lambda h, w: torch.sin(w * standard(h).to(h.dtype)))
    module = listed(Block(norm, dtype=dtype), SCHEDULE, *inputs(dtype))
    (node,) = norms(module)
    assert node.args[1] is not None
    assert node.args[4] == []
    assert module.context.counts["fused norms"] == 1
    assert "rsqrt" not in {str(target) for target in module.targets}

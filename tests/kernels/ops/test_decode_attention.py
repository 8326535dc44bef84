"""Attention of one token over a cache, against fp64."""

import math

import pytest
import torch
from triton.runtime import interpreter

from was_fx.kernels.ops import compact
from was_fx.kernels.ops.decode_attention import (
    PROGRAMS,
    decode_attention,
    decode_attention_op,
    reference,
    segment_size,
)
from was_fx.kernels.parts.arrivals import arrivals, arrivals_op

# numpy's warnings, from the interpreter, of lanes that are masked
pytestmark = [
    pytest.mark.usefixtures("loops"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

CUDA = torch.cuda.is_available()
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def tensors(device, dtype=torch.float32, *, batch=1, heads=4, shared=2, length=70, width=16):
    random = torch.Generator().manual_seed(length + width)
    shapes = (batch, heads, 1, width), (batch, shared, length, width), (batch, shared, length, width)
    return [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]


def exact(q, k, v, mask, scale):
    """[B, H, 1, D] in fp64, 0 where no key is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = (each.double().repeat_interleave(group, dim=1) for each in (k, v))
    logits = (q.double() @ k.mT) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.nan_to_num(logits.softmax(-1)) @ v


def assert_alike(q, k, v, mask=None, scale=0.3, tolerance=None):
    y, *_ = decode_attention(q, k, v, mask, scale)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    torch.testing.assert_close(y.double(), exact(q, k, v, mask, scale), rtol=0, atol=tolerance or TOLERANCE[q.dtype])


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_heads_of_any_width(device, dtype, width):
    assert_alike(*tensors(device, dtype, width=width), scale=width**-0.5)


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 4), (6, 2), (7, 1), (20, 1), (28, 4)])
def test_groups_of_any_size_share_keys(device, heads, shared):
    assert_alike(*tensors(device, heads=heads, shared=shared))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300, 1000])
def test_caches_of_any_length(device, length):
    assert_alike(*tensors(device, length=length))


MASKS = {
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "used": lambda n: torch.arange(n) < 67,
    "window": lambda n: (torch.arange(n) > 90) & (torch.arange(n) < 140),
    "first": lambda n: torch.arange(n) == 0,
    "last": lambda n: torch.arange(n) == n - 1,
    "every other": lambda n: torch.arange(n) % 2 == 0,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_hidden_keys_do_not_count(device, dtype, mask):
    assert_alike(*tensors(device, dtype, length=200), mask(200).view(1, 1, 1, -1).to(device))


@pytest.mark.parametrize("shared_mask", [False, True])
def test_sequences_of_a_batch_have_masks_of_their_own(device, shared_mask):
    q, k, v = tensors(device, batch=3, length=130)
    rows = [torch.arange(130) < 5, torch.arange(130) > 100, torch.arange(130) % 3 == 0]
    mask = torch.stack(rows)[:, None, None].to(device)
    assert_alike(q, k, v, mask[1:2] if shared_mask else mask)
    assert_alike(q, k, v, mask[1:2].expand(3, 1, 1, 130))


def test_no_key_gives_zero(device):
    q, k, v = tensors(device, batch=2)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=device)
    mask[1] = False
    y, *_ = decode_attention(q, k, v, mask, 0.3)
    assert y[1].eq(0).all()
    assert not y[0].eq(0).any()
    torch.testing.assert_close(reference(q, k, v, mask, 0.3)[0], y)


def test_hidden_keys_are_not_read(device):
    q, k, v = tensors(device, length=200)
    mask = (torch.arange(200) < 67).view(1, 1, 1, -1).to(device)
    clean, *_ = decode_attention(q, k, v, mask, 0.3)
    k[:, :, 67:], v[:, :, 67:] = math.nan, math.inf
    assert torch.equal(decode_attention(q, k, v, mask, 0.3)[0], clean)


def test_keys_are_read_where_they_are(device):
    q, k, v = tensors(device, length=100)
    wide = [each.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 10:90] for each in (k, v)]
    assert not wide[0].is_contiguous()
    assert_alike(q, *wide)
    assert_alike(q.expand(1, 4, 1, 16), *[each.mT.contiguous().mT for each in (k, v)])
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool, device=device)
    mask[..., 100:] = False
    assert_alike(q, k, v, mask[..., ::2])


def test_logits_of_any_size(device):
    q, k, v = tensors(device, length=150)
    for keys in (200 * k, k - 100, k + 100):
        assert_alike(q, keys, v, tolerance=1e-3)


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_nan_spoils_what_reads_it(device, which):
    q, k, v = arguments = tensors(device, length=80)
    arguments[which][0, 1, 0, 3] = math.nan
    y, *_ = decode_attention(q, k, v, None, 0.3)
    assert torch.equal(y.isnan(), exact(q, k, v, None, 0.3).nan_to_num(0.0).isnan() | spoiled(which, y))


def spoiled(which, y):
    """q[1], or k[1] or v[1], which the heads 2 and 3 read; only one column of y for v."""
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[:, 1 if which == 0 else slice(2, 4), :, 3 if which == 2 else slice(None)] = True
    return bad


@pytest.mark.parametrize("hidden", [1, 65, 80])
def test_key_infinitely_far_away_has_no_weight(device, hidden):
    """Even where it is the only one of its block."""
    q, k, v = tensors(device, length=hidden + 64)
    q = q.abs()
    k[:, :, 64:] = -math.inf
    assert_alike(q, k, v)


@pytest.mark.parametrize("siblings", [1, 4])
@pytest.mark.parametrize(
    ("heads", "shared", "width", "length"),
    [(4, 1, 16, 70), (3, 1, 80, 5), (4, 4, 80, 70), (2, 2, 8, 1), (20, 1, 64, 70), (14, 2, 112, 70), (9, 3, 96, 150)],
)
def test_output_is_listed(kept, device, dtype, heads, shared, width, length, siblings):
    q, k, v = tensors(device, dtype, heads=heads, shared=shared, width=width, length=length)
    channels = heads * width
    thresholds = [torch.rand(channels).to(device) / 8 for _ in range(siblings)]
    y, index, count = decode_attention(q, k, v, None, 0.3, thresholds)
    assert index.shape == (siblings, shared, segment_size(heads // shared, width))
    assert count.shape == (siblings, shared)
    for g, threshold in enumerate(thresholds):
        assert kept(index, count, g) == (~(y.flatten().abs() <= threshold)).nonzero().flatten().tolist()
        assert kept(index, count, g) == kept(*compact.reference(y.view(1, -1), thresholds), g)


@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 80), (6, 2, 16), (7, 1, 24)])
def test_reference_lists_the_same_segments(kept, device, heads, shared, width):
    arguments = (*tensors(device, heads=heads, shared=shared, width=width), None, 0.3)
    thresholds = [torch.rand(heads * width, device=device) / 4 for _ in range(2)]
    (_, index, count), (_, ours, counts) = reference(*arguments, thresholds), decode_attention(*arguments, thresholds)
    assert (index.shape, index.dtype) == (ours.shape, ours.dtype)
    assert torch.equal(count, counts)
    for g in range(2):
        assert 0 < len(kept(index, count, g)) < heads * width
        assert kept(index, count, g) == kept(ours, counts, g)


# Lengths by which no program, a few, or many of two kinds add up what others found.
SHARED = [(4, 2, 20), (4, 2, 70), (4, 1, 1100), (3, 1, 2100)]


@pytest.mark.parametrize(("heads", "shared", "length"), SHARED)
def test_counters_serve_call_after_call(device, heads, shared, length):
    q, k, v = tensors(device, heads=heads, shared=shared, length=length)
    thresholds = [torch.rand(heads * 16, device=device) / 8]
    counters = arrivals(q)
    assert (counters.shape, counters.dtype) == ((PROGRAMS,), torch.int32)
    first = decode_attention(q, k, v, None, 0.3, thresholds)
    torch.testing.assert_close(first[0].double(), exact(q, k, v, None, 0.3), rtol=0, atol=3e-6)
    for _ in range(2):
        y, _, count = decode_attention(q, k, v, None, 0.3, thresholds, counters)
        assert torch.equal(y, first[0])
        assert torch.equal(count, first[2])
        assert counters.eq(0).all()
        decode_attention(q[:, :1], k[:, :1, :130], v[:, :1, :130], None, 0.3, (), counters)  # of other sizes
        assert counters.eq(0).all()


@pytest.mark.parametrize(("heads", "shared", "length"), SHARED)
@pytest.mark.parametrize("hidden", [slice(0, 64), slice(70, None), slice(10, -10)], ids=str)
def test_splits_without_a_key_add_nothing(device, heads, shared, length, hidden):
    q, k, v = tensors(device, batch=2, heads=heads, shared=shared, length=length)
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device=device)
    mask[-1, ..., hidden] = False
    assert_alike(q, k, v, mask)


@pytest.mark.skipif(CUDA, reason="the order is the GPU's")
@pytest.mark.parametrize(("heads", "shared", "length"), SHARED)
def test_whoever_comes_last_gives_the_same(kept, monkeypatch, heads, shared, length):
    q, k, v = tensors("cpu", heads=heads, shared=shared, length=length)
    thresholds = [torch.rand(heads * 16) / 8]
    y, *listed = decode_attention(q, k, v, None, 0.3, thresholds)
    builder = interpreter.interpreter_builder
    begin, lasts = builder.set_grid_idx, set()
    for seed in range(2):
        ranks = torch.randperm(PROGRAMS, generator=torch.Generator().manual_seed(seed)).tolist()

        def begin_another(x, split, z, ranks=ranks):
            order = sorted(range(builder.grid_dim[1]), key=ranks.__getitem__)
            begin(x, order[split], z)
            lasts.add(order[-1])

        monkeypatch.setattr(builder, "set_grid_idx", begin_another)
        other, *relisted = decode_attention(q, k, v, None, 0.3, thresholds)
        assert torch.equal(other, y)
        assert kept(*relisted) == kept(*listed)
    assert len(lasts) > 1 or length < 65


@pytest.mark.parametrize(("threshold", "keeps"), [(math.inf, 0), (-1.0, 64)])
def test_nothing_or_everything_is_kept(kept, device, threshold, keeps):
    threshold = torch.full((64,), threshold, device=device)
    _, index, count = decode_attention(*tensors(device), None, 0.3, [threshold])
    assert kept(index, count) == list(range(keeps))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("thresholds", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_op_passes_opcheck(device, masked, thresholds, batch):
    if batch > 1 and thresholds:
        return
    mask = torch.ones(batch, 1, 1, 70, dtype=torch.bool, device=device) if masked else None
    q, k, v = tensors(device, batch=batch)
    arguments = (q, k, v, mask, 0.3, [torch.rand(64, device=device)] * thresholds)
    for counters in ((), (arrivals(q),)):
        torch.library.opcheck(
            decode_attention_op, (*arguments, *counters), test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(arrivals_op, (q,), test_utils=("test_schema", "test_faketensor"))

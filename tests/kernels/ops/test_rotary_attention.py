"""Attention of one token that turns and stores what it adds, against its meaning in plain PyTorch."""

import math

import pytest
import torch
from triton.runtime import interpreter

from was_fx.kernels.ops.decode_attention import BLOCK, PROGRAMS
from was_fx.kernels.ops.rotary_attention import reference, rotary_attention, rotary_attention_op
from was_fx.kernels.parts.arrivals import arrivals

# numpy's warnings, from the interpreter, of lanes that are masked
pytestmark = [
    pytest.mark.usefixtures("loops"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HIDDEN = {
    "causal": lambda n, position: torch.arange(n) <= position,
    "window": lambda n, position: (torch.arange(n) <= position) & (torch.arange(n) > position - 20),
    "not itself": lambda n, position: torch.arange(n) < position,
    "later ones": lambda n, position: torch.arange(n) >= position,
    "nothing": lambda n, position: torch.zeros(n, dtype=torch.bool),
}


def arguments(
    device,
    dtype=torch.float32,
    *,
    heads=4,
    shared=2,
    length=70,
    width=16,
    position=40,
    parts=3,
    biases=(False, False, False),
    hidden="causal",
    thresholds=1,
):
    random = torch.Generator().manual_seed(length + width + position)
    sizes = [heads * width, shared * width, shared * width]
    starts = [5, 5 + sizes[0], 5 + sizes[0] + sizes[1]]
    partial = torch.randn(parts, 1, sum(sizes) + 8, generator=random)
    angles = torch.randn(width, generator=random).view(1, 1, width)  # the halves need not be alike
    k, v = torch.randn(2, 1, shared, length, width, generator=random).to(device, dtype)
    mask = None if hidden is None else HIDDEN[hidden](length, position).view(1, 1, 1, length).to(device)
    return [
        partial.to(device),
        starts,
        [torch.randn(n, generator=random).to(device, dtype) if b else None for n, b in zip(sizes, biases, strict=True)],
        angles.cos().to(device, dtype),
        angles.sin().to(device, dtype),
        torch.tensor([position], device=device),
        k,
        v,
        mask,
        0.3,
        heads,
        [torch.rand(heads * width, generator=random).to(device) / 8 for _ in range(thresholds)],
    ]


def copied(given):
    return [each.clone() if isinstance(each, torch.Tensor) else each for each in given]


def assert_alike(kept, given, call=rotary_attention):
    expected_given, found_given = copied(given), copied(given)
    expected, found = reference(*expected_given), call(*found_given)
    for e, f in zip(expected_given, found_given, strict=True):
        if isinstance(e, torch.Tensor):
            torch.testing.assert_close(f, e, rtol=0, atol=1e-6 if e.dtype == torch.float32 else 1e-2)
    y, index, count = found
    assert (y.dtype, y.shape) == (given[6].dtype, expected[0].shape)
    torch.testing.assert_close(y, expected[0], rtol=0, atol=TOLERANCE[y.dtype], equal_nan=True)
    assert index.shape == expected[1].shape
    for g, threshold in enumerate(given[-1]):
        assert kept(index, count, g) == (~(y.flatten().abs() <= threshold)).nonzero().flatten().tolist()
    return found_given


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128])
def test_heads_of_any_width(kept, device, dtype, width):
    assert_alike(kept, arguments(device, dtype, width=width))


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (4, 4), (6, 2), (7, 1), (28, 4)])
def test_groups_of_any_size_share_keys(kept, device, heads, shared):
    assert_alike(kept, arguments(device, heads=heads, shared=shared))


@pytest.mark.parametrize("biases", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_outputs_are_summed(kept, device, dtype, parts, biases):
    assert_alike(kept, arguments(device, dtype, parts=parts, biases=biases))


@pytest.mark.parametrize("length", [1, 64, 65, 300, 1000])
@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_any_position_of_caches_of_any_length(kept, device, length, place):
    assert_alike(kept, arguments(device, length=length, position=int(place * (length - 1))))


@pytest.mark.parametrize("hidden", [*HIDDEN, None])
@pytest.mark.parametrize(("length", "position"), [(200, 67), (200, 128), (70, 69), (1100, 700)])
def test_hidden_keys_do_not_count(kept, device, hidden, length, position):
    assert_alike(kept, arguments(device, heads=4, shared=1, length=length, position=position, hidden=hidden))


def test_one_entry_is_written_and_hidden_ones_are_not_read(kept, device):
    given = arguments(device, length=200, position=67)
    before = copied(given)
    given[6][:, :, 67:], given[7][:, :, 67:] = math.nan, math.inf
    (first, *_), (clean, *_) = rotary_attention(*given), rotary_attention(*before)
    assert torch.equal(first, clean)
    assert given[6].isfinite().all(-1).all(1).flatten().nonzero().flatten().tolist() == list(range(68))
    assert torch.equal(given[6][:, :, :68], before[6][:, :, :68])
    assert torch.equal(given[7][:, :, :68], before[7][:, :, :68])


def test_keys_are_read_and_written_where_they_are(kept, device):
    given = arguments(device, length=80)
    for i in (6, 7):
        wide = torch.zeros(1, 100, 2, 16, device=device).transpose(1, 2)[:, :, 10:90]
        given[i] = wide.copy_(given[i])
        assert not given[i].is_contiguous()
    expected = copied(given)
    torch.testing.assert_close(rotary_attention(*given)[0], reference(*expected)[0], rtol=0, atol=3e-6)
    assert torch.equal(given[7], expected[7])
    given[6] = given[6].mT.contiguous().mT
    torch.testing.assert_close(rotary_attention(*given)[0], reference(*expected)[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("thresholds", [0, 1, 4])
@pytest.mark.parametrize("length", [20, 70, 1100])
def test_counters_serve_call_after_call(kept, device, thresholds, length):
    given = arguments(device, shared=1, length=length, position=15, thresholds=thresholds)
    counters = arrivals(given[6])
    y = assert_alike(kept, given)
    for _ in range(2):
        found = rotary_attention(*copied(given), counters)
        assert torch.equal(found[0], rotary_attention(*copied(given))[0])
        assert counters.eq(0).all()
    assert len(y) == len(given)


def test_a_position_outside_the_cache_writes_nothing(device):
    given = arguments(device, length=70)
    given[5].fill_(70)
    before = copied(given)
    if device == "cpu":
        rotary_attention(*given)
        assert torch.equal(given[6], before[6])
        assert torch.equal(given[7], before[7])


def test_nan_in_the_new_token_spoils_its_head(device):
    given = arguments(device, heads=4, shared=2)
    given[0][:, :, 5 + 4 * 16 + 3] = math.nan  # a channel of k of the first two heads
    y, *_ = rotary_attention(*given)
    assert y[:, :2].isnan().all()
    assert not y[:, 2:].isnan().any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the order is the GPU's")
@pytest.mark.parametrize("length", [BLOCK + 1, 1100])
def test_whoever_comes_last_gives_the_same(monkeypatch, length):
    given = arguments("cpu", shared=1, length=length, position=BLOCK)
    y, *listed = rotary_attention(*copied(given))
    builder = interpreter.interpreter_builder
    begin = builder.set_grid_idx
    ranks = torch.randperm(PROGRAMS, generator=torch.Generator().manual_seed(1)).tolist()
    seen = []

    def begin_another(x, split, z):
        order = sorted(range(builder.grid_dim[1]), key=ranks.__getitem__)
        seen.append(order[split])
        begin(x, order[split], z)

    monkeypatch.setattr(builder, "set_grid_idx", begin_another)
    other, *relisted = rotary_attention(*copied(given))
    assert seen != sorted(seen)
    assert torch.equal(other, y)
    assert torch.equal(relisted[1], listed[1])


def test_op_passes_opcheck(device):
    given = arguments(device, biases=(True, False, True))
    for counters in ((), (arrivals(given[6]),)):
        torch.library.opcheck(rotary_attention_op, (*given, *counters), test_utils=("test_schema", "test_faketensor"))

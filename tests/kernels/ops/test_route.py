"""A router by one kernel: the Linear's logits, and the largest of them as torch gives them."""

import math

import pytest
import torch
from triton.runtime import interpreter

from was_fx.kernels.ops.few_topk import MAX_ENTRIES
from was_fx.kernels.ops.route import MAX_CHANNELS, Tile, fits, reference, route, route_op
from was_fx.kernels.parts.arrivals import arrivals

CUDA = torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# Rows, experts and channels, k, and the tile.
CASES = [
    ((1,), 128, 256, 8, None),
    ((1,), 60, 200, 4, Tile(2, 4)),
    ((3,), 8, 33, 2, Tile(4, 4)),
    ((8,), 5, 64, 5, Tile(8, 4)),
    ((2, 1), 1, 16, 1, None),
    ((1,), 300, 48, 3, None),
    ((8,), 128, 64, 8, None),
]


def router(rows, entries, channels, dtype=torch.float32, device="cpu", bias=True):
    random = torch.Generator().manual_seed(entries + channels)
    shapes = (*rows, channels), (entries, channels), (entries,)
    x, weight, offset = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
    return x, weight / channels**0.5, offset if bias else None


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "entries", "channels", "k", "by"), CASES)
def test_it_gives_what_torch_gives(rows, entries, channels, k, by, dtype, softmax, device):
    x, weight, bias = router(rows, entries, channels, dtype, device, bias=softmax)
    logits, values, index = route(x, weight, bias, k, softmax, by=by)
    expected, *_ = reference(x, weight, bias, k, softmax)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(logits, expected, **tolerance)
    scores = logits.softmax(-1, dtype=torch.float32) if softmax else logits
    torch.testing.assert_close(values, torch.topk(scores, k).values, rtol=1e-5, atol=0)
    torch.testing.assert_close(values, scores.gather(-1, index), rtol=1e-5, atol=0)
    assert index.equal(torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k])
    assert (values.shape, index.shape, index.dtype) == ((*rows, k), (*rows, k), torch.int64)


def test_logits_are_rounded_once(dtype, device):
    """To the nearest numbers, of sums that are exact in fp32."""
    x, weight, bias = (each.mul(40).round().clamp(-128, 128) for each in router((1,), 16, 8, device=device))
    exact = x.double() @ weight.double().t() + bias.double()
    assert exact.equal(exact.to(dtype)) == (dtype == torch.float32)
    logits, *_ = route(x.to(dtype), weight.to(dtype), bias.to(dtype), 2, True)
    assert logits.equal(exact.to(dtype))


@pytest.mark.parametrize("softmax", [True, False])
def test_equal_ones_come_in_order(softmax, device):
    weight = torch.tensor([1.0, 3.0, -0.0, 3.0, 0.0, -math.inf, 3.0], device=device)[:, None]
    _, values, index = route(torch.ones(1, 1, device=device), weight, None, 7, softmax)
    assert index.tolist() == [[1, 3, 6, 0, 2, 4, 5]]
    expected = weight.flatten().softmax(0) if softmax else weight.flatten()
    torch.testing.assert_close(values[0], expected[index[0]])


def test_of_scores_that_vanish_the_greater_logits_come_first(device):
    weight = torch.tensor([-300.0, 0.0, -200.0, -250.0], device=device)[:, None]
    _, values, index = route(torch.ones(1, 1, device=device), weight, None, 4, True)
    assert index.tolist() == [[1, 2, 3, 0]]
    assert values.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_comes_first(bad, device):
    weight = torch.tensor([1.0, 2.0, bad, 0.0, 3.0], device=device)[:, None]
    x = torch.ones(1, 1, device=device)
    _, values, index = route(x, weight, None, 3, False)
    assert index.tolist() == [[2, 4, 1]]
    assert values[0].equal(weight[[2, 4, 1], 0]) or (math.isnan(bad) and values[0, 0].isnan())
    _, values, index = route(x, weight, None, 3, True)
    assert index.tolist() == [[2, 4, 1]]
    assert values.isnan().all()  # as torch's softmax is


def test_counters_serve_call_after_call(device):
    counters = arrivals(torch.empty(0, device=device))
    for rows, entries in ((1, 12), (3, 40), (8, 5), (1, 12)):
        given = router((rows,), entries, 32, device=device)
        for found, expected in zip(route(*given, 2, True, counters), reference(*given, 2, True), strict=True):
            torch.testing.assert_close(found, expected)
        assert counters.eq(0).all()


@pytest.mark.skipif(CUDA, reason="the order is the GPU's")
def test_whoever_comes_last_gives_the_same(monkeypatch):
    given = router((2,), 20, 32)
    expected = route(*given, 3, True)
    builder = interpreter.interpreter_builder
    begin, lasts = builder.set_grid_idx, set()
    for seed in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z, order=order: begin(order[x], y, z))
        lasts.add(order[-1])
        for found, each in zip(route(*given, 3, True), expected, strict=True):
            assert found.equal(each)
    assert len(lasts) > 1


def test_x_may_have_any_strides(device):
    x, weight, _ = router((4,), 6, 16, device=device, bias=False)
    spread = x.t().contiguous().t()
    for found, expected in zip(route(spread, weight, None, 2, True), route(x, weight, None, 2, True), strict=True):
        assert found.equal(expected)


def test_what_the_kernel_does_not_take_is_torchs(device):
    x, weight, bias = router((2,), 12, 16, device=device)
    assert fits(x, weight, bias, 3)
    others = [
        (x, weight.t().contiguous().t(), bias, 3),
        (x, weight.half(), bias, 3),
        (x, weight, bias.half(), 3),
        (x.expand(8, 2, 16), weight, bias, 3),
        (x, weight, bias, 13),
        (*router((1,), MAX_ENTRIES + 1, 2), 1),
        (*router((1,), 2, MAX_CHANNELS + 1), 1),
    ]
    assert not any(fits(*each) for each in others)
    for found, expected in zip(route(*others[0], True), reference(*others[0], True), strict=True):
        assert found.equal(expected)


@pytest.mark.parametrize("softmax", [True, False])
def test_the_op_is_well_behaved(softmax, device):
    given = router((2,), 9, 16, device=device)
    for counters in ((), (arrivals(given[0]),)):
        torch.library.opcheck(route_op, (*given, 3, softmax, *counters))

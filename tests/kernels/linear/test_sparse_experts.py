"""Products with chosen experts: the op, its meaning, its gradient, and each implementation of it."""

import math

import pytest
import torch

from was_fx.kernels.linear import gather_experts, gpu_experts
from was_fx.kernels.linear.quantized_experts import quantized_experts
from was_fx.kernels.linear.sparse_experts import by_expert, by_groups, call, choose, reference, sparse_experts
from was_fx.kernels.ops import compact_experts
from was_fx.kernels.parts.gemv_config import GemvConfig
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(rows=3, per=2, experts=5, k=40, n=24, dtype=torch.float32, *, bias=False, strange=False, seed=0):
    """(x, weight, bias, threshold, experts) with input-major storage and about half of the channels dropped."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=random).to(dtype)
    weight = (torch.randn(experts, k, n, generator=random) / k**0.5).to(dtype).mT
    b = torch.randn(experts, n, generator=random).to(dtype) if bias else None
    threshold = 1.35 * torch.rand(experts, k, generator=random)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:per] for _ in range(rows)]).flatten()
    if strange:
        chosen[0], chosen[-1] = experts, -1
    return x, weight, b, threshold, chosen


def slow(x, weight, bias, threshold, experts, tokens=None):
    """The meaning, one multiplication at a time, in Python's floats."""
    per, y = len(experts) // len(x), []
    for s, e in enumerate(experts.tolist()):
        if not 0 <= e < len(weight):
            y.append([0.0] * weight.shape[1])
            continue
        row, drops = x[s // per].tolist(), threshold is not None and (tokens is None or bool(tokens[s // per]))
        limits = threshold[e].tolist() if drops else None
        kept = [j for j, item in enumerate(row) if not drops or not abs(item) <= limits[j]]
        columns = weight[e].tolist()
        y.append(
            [
                sum(row[j] * column[j] for j in kept) + (0.0 if bias is None else float(bias[e, n]))
                for n, column in enumerate(columns)
            ]
        )
    return torch.tensor(y, dtype=torch.float64)


CASES = {
    "one token": {"rows": 1},
    "one token, one expert": {"rows": 1, "per": 1},
    "biases": {"bias": True},
    "other ranks' experts": {"strange": True, "bias": True},
    "one row each": {"rows": 6, "per": 1},
    "many tokens": {"rows": 20, "per": 3, "experts": 4, "k": 16, "n": 8},
    "odd sizes": {"k": 7, "n": 3, "rows": 2},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [False, True], ids=["all tokens", "some tokens"])
def test_the_op_computes_its_meaning(case, dtype, tokens, error):
    arguments = make(dtype=dtype, **CASES[case])
    some = torch.arange(len(arguments[0])) % 2 == 1 if tokens else None
    exact = slow(*arguments, some)
    for function in (reference, sparse_experts, call):
        assert error(function(*arguments, some), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_without_thresholds_every_channel_is_kept(case, error):
    x, weight, bias, _, experts = make(**CASES[case])
    assert error(sparse_experts(x, weight, bias, None, experts, None), slow(x, weight, bias, None, experts)) < 2e-6


def test_thresholds_of_zero_and_infinity(error):
    x, weight, bias, threshold, experts = make(bias=True)
    y = sparse_experts(x, weight, bias, torch.zeros_like(threshold), experts, None)
    assert error(y, slow(x, weight, bias, None, experts)) < 2e-6
    nothing = sparse_experts(x, weight, bias, torch.full_like(threshold, math.inf), experts, None)
    torch.testing.assert_close(nothing, bias[experts])


def test_nan_is_kept_where_its_expert_is(error):
    x, weight, _, threshold, experts = make(rows=2)
    x[0, 3] = math.nan
    y = sparse_experts(x, weight, None, threshold, experts, None)
    assert y[:2].isnan().all()
    assert not y[2:].isnan().any()


def test_no_rows():
    x, weight, _, threshold, experts = make()
    assert sparse_experts(x[:0], weight, None, threshold, experts[:0], None).shape == (0, 24)


@pytest.mark.parametrize("strange", [False, True])
def test_sorted_by_expert_is_the_same(strange, error, monkeypatch):
    arguments = make(rows=12, per=2, k=64, n=32, dtype=torch.bfloat16, bias=True, strange=strange)
    expected = reference(*arguments)
    assert error(by_groups(*arguments, None), expected.double()) < 1e-2
    some = torch.arange(12) % 3 > 0
    assert error(by_groups(*arguments, some), reference(*arguments, some).double()) < 1e-2
    x, weight, bias, _, experts = arguments
    assert error(by_groups(x, weight, bias, None, experts, None), slow(x, weight, bias, None, experts)) < 1e-2


def test_gradients_are_those_of_the_meaning():
    x, weight, bias, threshold, experts = make(rows=4, bias=True, strange=True, dtype=torch.float64)
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    again = [each.clone().requires_grad_() for each in (x, weight, bias)]
    some = torch.tensor([True, False, True, True])
    random = torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (sparse_experts(*leaves, threshold, experts, some) * random).sum().backward()
    (reference(*again, threshold, experts, some) * random).sum().backward()
    for found, expected in zip(leaves, again, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_the_op_is_well_behaved():
    x, weight, bias, threshold, experts = make(bias=True)
    torch.library.opcheck(sparse_experts, (x, weight, bias, threshold, experts, None))
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(sparse_experts, (leaf, weight, None, threshold, experts, torch.tensor([True, False, True])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 41)}, "expected x [R, K], weight [E, N, K]"),
        ({"x": torch.zeros(3, 40, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"threshold": torch.zeros(5, 41)}, "expected fp32 [5, 40]"),
        ({"threshold": torch.zeros(5, 40, dtype=torch.float64)}, "expected fp32 [5, 40]"),
        ({"bias": torch.zeros(5, 23)}, "expected torch.float32 [5, 24]"),
        ({"experts": torch.zeros(7, dtype=torch.int64)}, "as many for each of the 3 rows"),
        ({"experts": torch.zeros(6)}, "expected integers"),
        ({"tokens": torch.zeros(3)}, "expected bool [3]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, words):
    names = ("x", "weight", "bias", "threshold", "experts")
    given = {**dict(zip(names, make(), strict=True)), "tokens": None, **change}
    with pytest.raises(ValueError, match=r"sparse_experts") as caught:
        sparse_experts(*given.values())
    assert words in str(caught.value)


def test_what_is_chosen():
    x, weight, _, threshold, experts = make()
    assert choose(x, weight, threshold, experts, None).function is by_expert


# Triton's kernels.

SMALL = GemvConfig(rows=16, columns=32, splits=3, warps=4)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", ["one token", "other ranks' experts", "one row each", "odd sizes"])
def test_the_kernel_lists_what_each_expert_keeps(case, device, dtype):
    x, _, _, threshold, experts = make(dtype=dtype, **CASES[case])
    x, threshold, experts = x.to(device), threshold.to(device), experts.to(device)
    index, count = compact_experts.compact_experts(x, threshold, experts)
    expected, counts = compact_experts.reference(x, threshold, experts)
    assert torch.equal(count, counts)
    for s in range(len(experts)):
        for segment, n in enumerate(counts[s].tolist()):
            assert torch.equal(index[s, segment, :n], expected[s, segment, :n])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("one token", SMALL),
        ("other ranks' experts", None),
        ("one row each", SMALL),
        ("odd sizes", None),
        ("long", None),
    ],
)
def test_the_kernel_reads_what_is_listed(case, config, device, dtype, error):
    sizes = CASES.get(case, {"k": 1100, "n": 40, "rows": 1, "per": 3})
    x, weight, _, threshold, experts = make(dtype=dtype, **sizes)
    exact = slow(x, weight, None, threshold, experts)
    weight = weight.mT.to(device).mT
    x, threshold, experts = x.to(device), threshold.to(device), experts.to(device)
    assert gather_experts.supports(x, weight, experts)
    index, count = compact_experts.compact_experts(x, threshold, experts)
    partial = gather_experts.gather_experts(x, index, count, weight, experts, 3, config)
    by_hand = gather_experts.reference(x, index, count, weight, experts, 3)
    torch.testing.assert_close(partial, by_hand, rtol=1e-4, atol=1e-4)
    assert error(partial.sum(0).cpu(), exact) < 2e-6


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", ["one token", "other ranks' experts"])
def test_the_gpu_path_computes_the_op(case, device, dtype, error):
    x, weight, bias, threshold, experts = make(dtype=dtype, **CASES[case])
    exact = slow(x, weight, bias, threshold, experts)
    moved = (x, weight.mT, bias, threshold, experts)
    x, weight, bias, threshold, experts = (None if each is None else each.to(device) for each in moved)
    y = gpu_experts.sparse_experts(x, weight.mT, bias, threshold, experts, None)
    assert y.dtype == dtype
    assert error(y.cpu(), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 65, "per": 2},  # too many pairs
        {"dtype": torch.float64},
    ],
)
def test_what_the_kernel_does_not_serve(change):
    x, weight, _, _, experts = make(**change)
    assert not gather_experts.supports(x, weight, experts)


def test_the_kernel_wants_contiguous_rows(device):
    x, weight, _, _, experts = make()
    assert not gather_experts.supports(x.to(device), weight.contiguous().to(device), experts.to(device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 4])
def test_a_cuda_graph_follows_other_experts(rows):
    x, weight, _, threshold, experts = make(rows=rows, per=4, experts=8, k=256, n=128, dtype=torch.bfloat16)
    weight, x, threshold, experts = weight.mT.cuda().mT, x.cuda(), threshold.cuda(), experts.cuda()
    sparse_experts(x, weight, None, threshold, experts, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_experts(x, weight, None, threshold, experts, None)
    for seed in range(3):
        other = make(rows=rows, per=4, experts=8, k=256, n=128, dtype=torch.bfloat16, seed=seed)
        x.copy_(other[0])
        experts.copy_(other[4])
        graph.replay()
        expected = reference(x, weight, None, threshold, experts)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


# Quantised rows.


def quantised(weight, format):
    """(codes, scales, groups) of E experts, and their weights as they then are, [E, N, K]."""
    rows = [quantize_int8(each) if format == "int8" else quantize_int4("w", each, 32) for each in weight]
    stacked = [torch.stack([getattr(each, name) for each in rows]) for name in ("codes", "scales")]
    groups = None if format == "int8" else torch.stack([each.groups for each in rows])
    return (*stacked, groups), torch.stack([each.dequantize(torch.float32).t() for each in rows])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("case", ["one token", "other ranks' experts", "many tokens"])
@pytest.mark.parametrize("sparse", [True, False])
def test_quantised_experts_compute_the_meaning(case, format, sparse, error):
    x, weight, bias, threshold, experts = make(**CASES[case] | {"n": 32})
    rows, held = quantised(weight, format)
    threshold = threshold if sparse else None
    exact = slow(x, held, bias, threshold, experts)
    tolerance = 1e-2 if format == "int4" else 1e-4  # x has eight bits beside int4
    assert error(quantized_experts(x, *rows, bias, threshold, experts, None), exact) < tolerance
    if sparse:
        some = torch.arange(len(x)) % 2 == 1
        y = quantized_experts(x, *rows, bias, threshold, experts, some)
        assert error(y, slow(x, held, bias, threshold, experts, some)) < tolerance


def test_the_op_of_quantised_experts_is_well_behaved():
    x, weight, bias, threshold, experts = make(bias=True)
    rows, _ = quantised(weight, "int8")
    torch.library.opcheck(quantized_experts, (x, *rows, bias, threshold, experts, None))
    with pytest.raises(ValueError, match="expected x"):
        quantized_experts(x[:, 1:], *rows, bias, threshold, experts, None)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("case", [{"rows": 1, "per": 3}, {"rows": 3, "strange": True, "bias": True}])
def test_the_kernel_reads_listed_codes(case, format, device, dtype, error):
    x, weight, bias, threshold, experts = make(k=72, n=64, dtype=dtype, **case)
    rows, held = quantised(weight.float(), format)
    exact = slow(x, held, bias, threshold, experts)
    rows = [None if each is None else each.to(device) for each in rows]
    bias = None if bias is None else bias.to(device)
    x, threshold, experts = x.to(device), threshold.to(device), experts.to(device)
    config = GemvConfig(rows=16, columns=32, splits=2, warps=2)
    listed = compact_experts.compact_experts(x, threshold, experts)
    partial = gather_experts.gather_quantized_experts(x, *listed, *rows, experts, 2, config)
    total = gpu_experts.finish(partial.sum(0), bias, experts, torch.float32)
    assert error(total.cpu(), exact) < 2e-4
    assert gpu_experts.supports_quantized(x, *rows, experts)
    y = gpu_experts.quantized_experts(x, *rows, bias, threshold, experts)
    assert error(y.cpu(), exact) < max(2e-3, TOLERANCE[dtype])

"""`was::dense_linear`: what serves it, its values and its gradients."""

import pytest
import torch

from was_fx.kernels.cpu import library
from was_fx.kernels.linear import dense_linear
from was_fx.kernels.linear.dense_linear import choose

COMPILED = library.library() is not None
needs_library = pytest.mark.skipif(not COMPILED, reason="no C++ compiler")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@needs_library
@pytest.mark.parametrize(
    ("tokens", "dtype", "input_major", "native", "kind", "served"),
    [
        (1, BF16, True, False, "avx2", "cpu_gather"),
        (4, BF16, True, False, "avx2", "cpu_gather"),
        (5, BF16, True, False, "avx2", "cpu_product"),
        (2048, BF16, True, False, "avx2", "cpu_product"),
        (2048, BF16, True, True, "avx512", "cpu_product"),
        (64, BF16, True, True, "avx512bf16", "cpu_product"),
        (65, BF16, True, True, "avx512bf16", "torch"),
        (64, BF16, True, True, "amx", "cpu_product"),
        (65, BF16, True, True, "amx", "torch"),
        (2048, FP16, True, False, "amx", "cpu_product"),
        (2048, FP16, True, True, "amx", "torch"),
        (8, FP32, True, True, "avx2", "cpu_gather"),
        (9, FP32, True, True, "avx2", "torch"),
        (1, BF16, False, False, "avx2", "cpu_rows"),
        (4, FP32, False, True, "avx2", "cpu_rows"),
        (5, BF16, False, False, "avx2", "torch"),
        (1, FP64, True, True, "avx2", "torch"),
        (0, BF16, True, False, "avx2", "torch"),
    ],
)
def test_choice(make_case, monkeypatch, tokens, dtype, input_major, native, kind, served):
    monkeypatch.setattr(dense_linear, "multiplies_natively", lambda _: native)
    monkeypatch.setattr(dense_linear, "kind", lambda: library.KINDS.index(kind))
    case = make_case((tokens, 12), (5,), dtype, input_major=input_major)
    assert choose(case.x, case.weights[0]).name == served


@needs_library
def test_large_weights_in_pairs_are_ours(monkeypatch):
    monkeypatch.setattr(dense_linear, "multiplies_natively", lambda _: True)
    monkeypatch.setattr(dense_linear, "kind", lambda: library.KINDS.index("avx512bf16"))
    x, weight = torch.empty(70, 1024, dtype=BF16), torch.empty(1024, 1024, dtype=BF16).t()
    assert choose(x, weight).name == "cpu_product"


def test_other_dtypes_devices_and_strides_are_torchs(make_case):
    case = make_case((2, 12), (5,), BF16)
    x, weight = case.x, case.weights[0]
    assert choose(x.float(), weight).name == "torch"
    assert choose(x.to("meta"), weight.to("meta")).name == "torch"
    assert choose(x, torch.randn(5, 24).bfloat16()[:, ::2]).name == "torch"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("input_major", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (40, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values(make_case, error, dtype, input_major, shape, bias):
    case = make_case(shape, (70,), dtype, threshold=0, input_major=input_major, biases=[bias])
    y = dense_linear.dense_linear(case.x, case.weights[0], case.biases[0])
    assert y.dtype == dtype
    if y.numel():
        assert error(y, case.exact()) < 1e-2
    else:
        assert y.shape == (*shape[:-1], 70)


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12)], ids=str)
def test_gradients_are_those_of_a_linear(make_case, shape):
    case = make_case(shape, (7,), threshold=0, biases=[True])
    inputs = [case.x, case.weights[0], case.biases[0]]
    found, expected = (
        torch.autograd.grad(function(*mine).square().sum(), mine)
        for function in (dense_linear.call, torch.nn.functional.linear)
        for mine in [[each.clone().requires_grad_() for each in inputs]]
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_op_is_a_proper_one(make_case):
    case = make_case((3, 12), (7,), threshold=0, biases=[True])
    for bias in (case.biases[0], None):
        torch.library.opcheck(dense_linear.dense_linear, (case.x, case.weights[0], bias))


def test_the_call_past_the_dispatcher_is_the_same(make_case):
    case = make_case((3, 12), (7,), threshold=0, biases=[True])
    arguments = case.x, case.weights[0], case.biases[0]
    with torch.no_grad():
        assert torch.equal(dense_linear.call(*arguments), dense_linear.dense_linear(*arguments))


def test_modes_see_the_call(make_case):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    case = make_case((3, 12), (7,), threshold=0)
    with torch.no_grad(), Mode():
        dense_linear.call(case.x, case.weights[0], None)
    assert dense_linear.dense_linear in seen

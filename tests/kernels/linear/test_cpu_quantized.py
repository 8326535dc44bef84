"""Products with kept rows of int8 and int4 on a CPU, by every kind of kernel, against fp64."""

import pytest
import torch

from was_fx.kernels.cpu import library
from was_fx.kernels.cpu.library import KINDS
from was_fx.kernels.linear import cpu_quantized
from was_fx.kernels.linear.quantized_linear import reference
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8

# int4 rounds the factors of sixteen channels to 8 bits of the largest.
TOLERANCE = {("int8", torch.float32): 5e-6, ("int4", torch.float32): 2e-2}


@pytest.fixture(params=["plain", "avx2", "avx512"])
def kind(request, monkeypatch):
    if library.library() is None:
        pytest.skip("no C++ compiler was found")
    if KINDS.index(request.param) > library.library().was_processor():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(library.LIMIT, request.param)
    library.kind.cache_clear()
    yield request.param
    monkeypatch.undo()
    library.kind.cache_clear()


def rows_of(format, outputs, channels, group=32):
    weight = torch.randn(outputs, channels) * 0.1
    return quantize_int8(weight) if format == "int8" else quantize_int4("w", weight, group)


def error(y, expected):
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(64, 96, 32), (192, 50, 64), (1056, 333, 32), (384, 200, 128)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_siblings_with_bias_and_thresholds(kind, format, dtype, n, k, group, tokens):
    rows = [rows_of(format, n, k, group), rows_of(format, n, k, group)]
    x, bias, limit = torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype), torch.full((k,), 0.6)
    for thresholds in ([None, None], [limit, None]):
        assert cpu_quantized.supports(x, rows)
        y = cpu_quantized.sparse_linear(x, rows, [bias, None], thresholds)
        expected = reference(x.double(), rows, [bias.double(), None], thresholds)
        assert y.dtype == dtype
        assert error(y, expected) < TOLERANCE.get((format, dtype), 2e-2)


@pytest.mark.parametrize("n", [1, 5, 33, 100])
def test_any_number_of_outputs_of_int8(kind, n):
    rows, x = rows_of("int8", n, 70), torch.randn(2, 70)
    assert (
        error(cpu_quantized.sparse_linear(x, [rows], [None], [None]), reference(x.double(), [rows], [None], [None]))
        < 1e-5
    )


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("outputs", [1056, 4160])  # rows are shared, or columns
def test_sums_do_not_depend_on_the_number_of_threads(kind, format, outputs):
    rows, x = rows_of(format, outputs, 300), torch.randn(1, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_quantized.sparse_linear(x, [rows], [None], [None])
        others = []
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            others.append(cpu_quantized.sparse_linear(x, [rows], [None], [None]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("format", "n", "group"), [("int8", 100, 0), ("int4", 96, 32), ("int4", 256, 128)])
def test_rows_written_out_are_those_dequantised(kind, dtype, format, n, group):
    rows = rows_of(format, n, 70, group)
    torch.testing.assert_close(cpu_quantized.write_out(rows, dtype), rows.dequantize(dtype), rtol=1e-2, atol=1e-6)

"""Every kind of C++ kernel that this processor can run, against fp64."""

import pytest
import torch

from was_fx.kernels.cpu import library
from was_fx.kernels.linear import cpu_gather, cpu_product

if library.library() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SHAPES = [(1, 1), (2, 3), (7, 70), (64, 48), (129, 65), (333, 1029), (1100, 200), (40, 4200)]


@pytest.fixture(params=library.KINDS[: library.library().was_processor() + 1], autouse=True)
def kind(request, monkeypatch):
    monkeypatch.setenv(library.LIMIT, request.param)
    library.kind.cache_clear()
    assert library.KINDS[library.kind()] == request.param
    yield request.param
    library.kind.cache_clear()


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()

    def run(threads, function, *arguments):
        torch.set_num_threads(threads)
        return function(*arguments)

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("k", "n"), SHAPES, ids=str)
def test_gather(make_case, error, dtype, tokens, k, n):
    case = make_case((tokens, k), (n,), dtype, biases=[True])
    assert error(cpu_gather.sparse_linear(*case.arguments()), case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_gather_of_siblings_that_keep_everything(make_case, error, dtype, tokens):
    case = make_case((tokens, 333), (70, 129, 1), dtype, threshold=0, biases=[True, False, True])
    y = cpu_gather.sparse_linear(case.x, case.weights, case.biases, None)
    assert error(y, case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 9, 12, 13, 33, 70])
@pytest.mark.parametrize(("k", "n"), SHAPES, ids=str)
@pytest.mark.parametrize("product", [cpu_product.by_columns, cpu_product.by_rows], ids=["columns", "rows"])
def test_product(make_case, error, dtype, tokens, k, n, product):
    by_columns = product is cpu_product.by_columns
    case = make_case((tokens, k), (n,), dtype, threshold=0, biases=[True], input_major=by_columns)
    y = product(case.x, case.weights[0], case.biases[0])
    assert error(y, case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_no_number_stays_none(dtype, value):
    x, weight = torch.ones(3, 40, dtype=dtype), torch.eye(40, dtype=dtype)
    x[1, 7] = value
    expected = torch.ones(3, 40, dtype=dtype)
    expected[1] = float("nan")  # infinity times zero
    if value == value:
        expected[1, 7] = value
    thresholds = [torch.full((40,), 0.5)]
    for y in (
        cpu_product.by_columns(x, weight, None),
        cpu_product.by_rows(x, weight, None),
        cpu_gather.sparse_linear(x, [weight], [None], thresholds),
        cpu_gather.sparse_linear(x[1:2], [weight], [None], thresholds),
    ):
        torch.testing.assert_close(y, expected if len(y) == 3 else expected[1:2], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_is_read_and_rounded_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    if dtype == torch.bfloat16:  # products of pairs take subnormal numbers for zero
        every = every[(every == 0) | (every.abs().float() >= 2 * torch.finfo(dtype).tiny)]
    weight = torch.ones(1, 1, dtype=dtype)
    halves = torch.tensor([[0.5]], dtype=dtype)
    for factor in (weight, halves):
        expected = (every.float() * factor.float().item()).to(dtype)
        # All values as weights of one channel, and as many outputs.
        table = every.view(1, -1)
        assert torch.equal(cpu_product.by_columns(factor, table.t(), None)[0], expected)
        assert torch.equal(cpu_gather.sparse_linear(factor, [table.t()], [None], None)[0], expected)
        assert torch.equal(cpu_product.by_rows(factor, every.view(-1, 1), None)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("n", [33, 200, 4133])
def test_sums_do_not_depend_on_the_number_of_threads(make_case, dtype, tokens, n, with_threads):
    case = make_case((tokens, 270), (n,), dtype, biases=[True])
    by_rows = case.weights[0].contiguous()
    for function, arguments in (
        (cpu_gather.sparse_linear, case.arguments()),
        (cpu_product.by_columns, (case.x, case.weights[0], case.biases[0])),
        (cpu_product.by_rows, (case.x, by_rows, case.biases[0])),
    ):
        one, *others = (with_threads(threads, function, *arguments) for threads in (1, 2, 3, 4, 6))
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6])
def test_siblings_of_short_and_long_rows(make_case, error, tokens, threads, with_threads):
    """Threads share the kept rows of some and the columns of others in one call."""
    case = make_case((tokens, 130), (4133, 100, 1030, 33), torch.bfloat16, biases=[True, False, True, True])
    y = with_threads(threads, cpu_gather.sparse_linear, *case.arguments())
    assert error(y, case.exact()) < TOLERANCE[torch.bfloat16]


def test_infinite_thresholds_keep_nothing(make_case):
    case = make_case((2, 50), (9,))
    case.thresholds = [torch.full((50,), float("inf"))]
    assert torch.equal(cpu_gather.sparse_linear(*case.arguments()), torch.zeros(2, 9))

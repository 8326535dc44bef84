"""The two gathers on a CPU, in C++ and through embedding_bag, against fp64."""

import itertools

import pytest
import torch

from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPE_ROWS = [(torch.float32, 1), (torch.float32, 3), (torch.float32, 4), (torch.bfloat16, 1), (torch.bfloat16, 2)]


@pytest.fixture(params=[cpu_gather, cpu_embedding_bag], ids=["C++", "embedding_bag"])
def kernel(request):
    return request.param


@pytest.fixture
def gather(kernel):
    def run(case):
        assert kernel.supports(case.x, case.weights)
        return kernel.sparse_linear(*case.arguments())

    return run


@pytest.mark.parametrize(("dtype", "rows"), DTYPE_ROWS, ids=str)
@pytest.mark.parametrize(
    ("k", "n"), [(1, 1), (1, 5), (5, 1), (7, 11), (64, 48), (333, 129), (3001, 17), (19, 2999)], ids=str
)
def test_gather_is_accurate(make_case, error, k, n, dtype, rows, gather):
    case = make_case((rows, k), (n,), dtype, biases=[True])
    assert error(gather(case), case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "rows"), DTYPE_ROWS, ids=str)
@pytest.mark.parametrize("outputs", [(6, 6), (6, 6, 6), (8, 4, 4), (4, 4, 8), (5, 3, 5), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("adjacent", "adjacent_thresholds"), itertools.product([False, True], repeat=2), ids=lambda flag: str(int(flag))
)
def test_siblings_are_accurate_however_they_lie(
    make_case, error, outputs, adjacent, adjacent_thresholds, dtype, rows, gather
):
    biases = [i % 2 == 0 for i in range(len(outputs))]
    case = make_case(
        (rows, 37), outputs, dtype, adjacent=adjacent, adjacent_thresholds=adjacent_thresholds, biases=biases
    )
    assert error(gather(case), case.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("outputs", [(6,), (6, 6, 6), (8, 4, 4)], ids=str)
def test_embedding_bag_reads_the_weights_themselves(make_case, monkeypatch, outputs, adjacent):
    case = make_case((1, 16), outputs, adjacent=adjacent)
    seen = []
    inner = torch.nn.functional.embedding_bag
    monkeypatch.setattr(
        torch.nn.functional, "embedding_bag", lambda *a, **k: seen.append(a[1].data_ptr()) or inner(*a, **k)
    )
    cpu_embedding_bag.sparse_linear(*case.arguments())
    assert seen == [weight.data_ptr() for weight in case.weights]  # never a copy


def test_siblings_out_of_order_in_memory_are_not_taken_for_adjacent(make_case, error, gather):
    case = make_case((1, 16), (6, 6, 6), adjacent=True)
    case.weights.reverse()
    assert error(gather(case), case.exact()) < TOLERANCE[torch.float32]


def test_one_weight_used_twice_with_two_thresholds(make_case, error, gather):
    case = make_case((1, 16), (6, 6))
    case.weights = [case.weights[0], case.weights[0]]
    assert error(gather(case), case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x + 1, x], dim=-1)[:, x.shape[1] :],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["every second", "column-major", "slice", "expanded"],
)
def test_noncontiguous_input(make_case, error, rows, groups, change, gather):
    case = make_case((rows, 21), (6,) * groups, adjacent=True)
    case.x = change(case.x)
    assert error(gather(case), case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "make",
    [lambda k: torch.linspace(0.1, 1.5, 2 * k)[::2], lambda k: torch.tensor(0.5).expand(k)],
    ids=["every second", "expanded"],
)
def test_noncontiguous_thresholds(make_case, error, groups, make, gather):
    case = make_case((1, 41), (6,) * groups, adjacent=True)
    case.thresholds = [make(41) for _ in range(groups)]
    assert error(gather(case), case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (2, 1, 16), (2, 2, 16)], ids=str)
def test_leading_dimensions_are_kept(make_case, error, shape, gather):
    case = make_case(shape, (6, 3))
    y = gather(case)
    assert y.shape == (*shape[:-1], 9)
    assert error(y, case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_keep_nothing_are_zero(make_case, error, rows, gather):
    case = make_case((rows, 16), (6, 6), adjacent=True)
    case.x[0] = 0
    y = gather(case)
    assert torch.equal(y[0], torch.zeros(12))
    if rows > 1:
        assert error(y, case.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5])
def test_fewer_kept_channels_than_bags(make_case, threads, kept, gather):
    case = make_case((1, 16), (6, 6), adjacent=True, threshold=0)
    case.x[:, kept:] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = gather(case)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y.double(), case.exact())


@pytest.mark.parametrize(("dtype", "rows"), DTYPE_ROWS, ids=str)
def test_same_input_gives_the_same_bits(make_case, dtype, rows, gather):
    case = make_case((rows, 513), (64, 64), dtype, adjacent=True)
    assert torch.equal(gather(case), gather(case))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("outputs", [(4096,), (40, 8200), (31, 33, 5000)], ids=str)
def test_cpp_sums_in_one_order_for_any_number_of_threads(make_case, dtype, outputs):
    case = make_case((2, 129), outputs, dtype, biases=[True] * len(outputs))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu_gather.sparse_linear(*case.arguments()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("shape", "dtype", "weight_dtype", "input_major", "served"),
    [
        ((1, 12), torch.float32, torch.float32, True, True),
        ((12,), torch.float32, torch.float32, True, True),
        ((1, 2, 12), torch.bfloat16, torch.bfloat16, True, True),
        ((1, 12), torch.float64, torch.float64, True, False),
        ((1, 12), torch.bfloat16, torch.float32, True, False),
        ((1, 12), torch.float32, torch.bfloat16, True, False),
        ((1, 12), torch.float32, torch.float32, False, False),
        ((0, 12), torch.float32, torch.float32, True, False),
    ],
    ids=str,
)
def test_supports(make_case, kernel, shape, dtype, weight_dtype, input_major, served):
    case = make_case(shape, (5, 7), weight_dtype, input_major=input_major)
    assert kernel.supports(case.x.to(dtype), case.weights) is served


@pytest.mark.parametrize(("kernel", "served"), [(cpu_gather, True), (cpu_embedding_bag, False)], ids=str)
def test_fp16_is_served_in_cpp(make_case, kernel, served):
    case = make_case((1, 12), (5, 7), torch.float16)
    assert kernel.supports(case.x, case.weights) is served


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("more", [0, 1])
def test_supports_as_many_tokens_as_pay(make_case, kernel, dtype, more):
    tokens = (kernel.max_tokens(dtype) if kernel is cpu_gather else kernel.MAX_TOKENS[dtype]) + more
    for shape in ((tokens, 12), (1, tokens, 12)):
        case = make_case(shape, (5, 7), dtype)
        assert kernel.supports(case.x, case.weights) is (more == 0)


def test_one_row_major_sibling_is_enough_to_refuse(make_case, kernel):
    case = make_case((1, 12), (5, 7))
    case.weights[1] = case.weights[1].contiguous()
    assert not kernel.supports(case.x, case.weights)

"""The op and its meaning."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from was_fx.kernels.linear import cpu_gather
from was_fx.kernels.linear.sparse_linear import dropped_channels, implementation, reference, sparse_linear

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def slow(x, weights, biases, thresholds, sequence, dense):
    """The meaning, one multiplication at a time, in Python's floats."""
    rows = x.reshape(-1, x.shape[-1]).tolist()
    y = []
    for r, row in enumerate(rows):
        outputs = []
        for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
            limits = threshold.tolist()
            kept = [j for j, item in enumerate(row) if r % sequence < dense or not abs(item) <= limits[j]]
            for n, column in enumerate(weight.tolist()):
                outputs.append(sum(row[j] * column[j] for j in kept) + (0.0 if bias is None else float(bias[n])))
        y.append(outputs)
    return torch.tensor(y, dtype=torch.float64).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 5), (3, 1, 9), (2, 3, 4)], ids=str)
def test_op_is_the_written_out_sum(make_case, error, shape, dtype):
    case = make_case(shape, (3, 1, 4), dtype, biases=[True, False, True])
    y = sparse_linear(*case.arguments(), 1, 0)
    assert y.dtype == dtype
    assert error(y, slow(*case.arguments(), 1, 0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("sequence", [1, 2, 3, 4])
@pytest.mark.parametrize("dense", [0, 1, 2, 3, 5])
def test_leading_tokens_of_every_sequence_stay_dense(make_case, error, sequence, dense):
    case = make_case((3, sequence, 6), (4, 2), biases=[True, False])
    y = sparse_linear(*case.arguments(), sequence, dense)
    assert error(y, slow(*case.arguments(), sequence, dense)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("x", "threshold", "dropped"),
    [
        (0.0, 0.0, True),
        (-0.0, 0.0, True),
        (1e-45, 0.0, False),
        (0.5, 0.5, True),
        (-0.5, 0.5, True),
        (0.5, 0.49999997, False),
        (-0.75, 0.5, False),
        (3e38, math.inf, True),
        (math.inf, 1e38, False),
        (-math.inf, 1e38, False),
        (math.inf, math.inf, True),
        (math.nan, 0.5, False),
        (math.nan, math.inf, False),
    ],
)
def test_channel_is_dropped_when_its_magnitude_is_at_most_the_threshold(x, threshold, dropped):
    found = dropped_channels(torch.tensor([[x]]), torch.tensor([threshold]), 1, 0)
    assert found.tolist() == [[dropped]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_thresholds_are_compared_in_fp32(dtype):
    x = torch.tensor([[0.5]], dtype=dtype)
    assert dropped_channels(x, torch.tensor([0.5001]), 1, 0).item()  # 0.5 in the input's dtype
    assert not dropped_channels(x, torch.tensor([0.4999]), 1, 0).item()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kept_nonfinite_input_spoils_its_own_row_only(make_case, rows, bad):
    case = make_case((rows, 16), (5, 3))
    case.x[-1, 4] = bad
    y = sparse_linear(*case.arguments(), 1, 0)
    assert torch.isfinite(y[:-1]).all()
    assert not torch.isfinite(y[-1]).any()


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_threshold_gives_the_bias(make_case, rows, dtype):
    case = make_case((rows, 33), (5, 7, 5), dtype, biases=[True, False, True])
    case.thresholds = [torch.full((33,), math.inf) for _ in case.thresholds]
    y = sparse_linear(*case.arguments(), 1, 0)
    bias = torch.cat([case.biases[0], torch.zeros(7, dtype=dtype), case.biases[2]])
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threshold_zero_equals_the_dense_linear(make_case, error, rows, dtype):
    case = make_case((rows, 129), (65,), dtype, threshold=0, biases=[True])
    y = sparse_linear(*case.arguments(), 1, 0)
    dense = torch.nn.functional.linear(case.x.double(), case.weights[0].double(), case.biases[0].double())
    assert error(y, dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_no_tokens_give_no_rows(make_case, shape):
    case = make_case(shape, (3, 2))
    assert sparse_linear(*case.arguments(), 1, 0).shape == (*shape[:-1], 5)


@pytest.mark.parametrize(
    ("rows", "dtype", "input_major", "dense", "chosen"),
    [
        (1, torch.float32, True, 0, cpu_gather.sparse_linear),
        (8, torch.float32, True, 0, cpu_gather.sparse_linear),
        (9, torch.float32, True, 0, reference),
        (1, torch.bfloat16, True, 0, cpu_gather.sparse_linear),
        (9, torch.bfloat16, True, 0, reference),
        (1, torch.float16, True, 0, reference),
        (1, torch.float64, True, 0, reference),
        (1, torch.float32, False, 0, reference),
        (1, torch.float32, True, 1, reference),
        (0, torch.float32, True, 0, reference),
    ],
)
def test_choice_of_implementation(make_case, rows, dtype, input_major, dense, chosen):
    case = make_case((rows, 12), (8, 4), dtype, input_major=input_major)
    assert implementation(case.x, case.weights, dense) is chosen


def test_every_argument_order_of_siblings_gives_the_same_parts(make_case):
    case = make_case((1, 24), (5, 3, 8), biases=[True, False, True])
    parts = sparse_linear(*case.arguments(), 1, 0).split([5, 3, 8], dim=-1)
    for order in itertools.permutations(range(3)):
        picked = [[column[i] for i in order] for column in (case.weights, case.biases, case.thresholds)]
        y = sparse_linear(case.x, *picked, 1, 0)
        assert torch.equal(y, torch.cat([parts[i] for i in order], dim=-1))


@pytest.mark.parametrize(
    ("shape", "dtype", "sequence", "dense"),
    [
        ((1, 24), torch.float32, 1, 0),
        ((1, 1, 24), torch.bfloat16, 1, 0),
        ((2, 1, 24), torch.float32, 1, 0),
        ((2, 9, 24), torch.float32, 9, 4),
        ((24,), torch.float32, 1, 0),
    ],
    ids=str,
)
def test_op_passes_opcheck(make_case, shape, dtype, sequence, dense):
    case = make_case(shape, (5, 5, 3), dtype, adjacent=True, biases=[True, False, True])
    torch.library.opcheck(sparse_linear, (*case.arguments(), sequence, dense))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (4, 9, 24)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_fake_result_has_shape_dtype_and_strides_of_the_real_one(make_case, shape, strided):
    case = make_case(shape, (5, 3), torch.bfloat16)
    if strided:
        case.x = torch.cat([case.x, case.x], dim=-1)[..., ::2]
    real = sparse_linear(*case.arguments(), 1, 0)
    with FakeTensorMode() as mode:
        fake = [[None if t is None else mode.from_tensor(t) for t in column] for column in case.arguments()[1:]]
        y = sparse_linear(mode.from_tensor(case.x), *fake, 1, 0)
    assert (y.shape, y.dtype, y.device, y.stride()) == (real.shape, real.dtype, real.device, real.stride())


def test_fake_result_keeps_symbolic_sizes(make_case):
    case = make_case((2, 7, 24), (5, 3))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(case.x)
        y = sparse_linear(
            x, *[[mode.from_tensor(t) if t is not None else None for t in c] for c in case.arguments()[1:]], 1, 0
        )
    assert y.shape[:2] == x.shape[:2]
    assert y.shape[2] == 8
    assert any(isinstance(size, torch.SymInt) for size in y.shape)

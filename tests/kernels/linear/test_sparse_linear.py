"""The op, its meaning, its gradient, and what is chosen to compute it."""

import contextlib
import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from was_fx.kernels.linear import cpu_embedding_bag, cpu_gather
from was_fx.kernels.linear.sparse_linear import (
    choose,
    dropped_channels,
    reference,
    sparse_linear,
    sparse_siblings,
)
from was_fx.kernels.parts.served import noting_served

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def slow(x, weights, biases, thresholds, tokens=None):
    """The meaning, one multiplication at a time, in Python's floats."""
    rows = x.reshape(-1, x.shape[-1]).tolist()
    sparse = [True] * len(rows) if tokens is None else tokens.flatten().tolist()
    y = []
    for row, drops in zip(rows, sparse, strict=True):
        outputs = []
        for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
            limits = threshold.tolist()
            kept = [j for j, item in enumerate(row) if not drops or not abs(item) <= limits[j]]
            for n, column in enumerate(weight.tolist()):
                outputs.append(sum(row[j] * column[j] for j in kept) + (0.0 if bias is None else float(bias[n])))
        y.append(outputs)
    return torch.tensor(y, dtype=torch.float64).view(*x.shape[:-1], -1)


def each(case, tokens=None):
    """The outputs of `sparse_linear` for the siblings of a case, side by side."""
    columns = zip(case.weights, case.biases, case.thresholds, strict=True)
    return torch.cat([sparse_linear(case.x, *column, tokens) for column in columns], dim=-1)


def together(case, tokens=None):
    """The same by `sparse_siblings`."""
    return sparse_siblings(*case.arguments(), tokens)


@pytest.fixture(params=["one by one", "siblings"])
def op(request):
    """(case, tokens=None) -> y [..., ΣN], by one op for each or by the one for siblings."""
    return (
        each if request.param == "one by one" else lambda case, tokens=None: sparse_siblings(*case.arguments(), tokens)
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (1, 7), (2, 5), (3, 1, 9), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("input_major", [True, False])
def test_op_is_the_written_out_sum(make_case, error, op, shape, dtype, input_major):
    case = make_case(shape, (3, 1, 4), dtype, biases=[True, False, True], input_major=input_major)
    y = op(case)
    assert y.dtype == dtype
    assert error(y, slow(*case.arguments())) < TOLERANCE[dtype]


MASKS = {
    "all": [[1, 1, 1], [1, 1, 1]],
    "none": [[0, 0, 0], [0, 0, 0]],
    "after the first": [[0, 1, 1], [0, 1, 1]],
    "of one sequence": [[0, 0, 0], [1, 1, 1]],
    "any": [[0, 1, 0], [1, 0, 1]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 6), (6, 6), (2, 3, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_outside_of_the_mask_keep_every_channel(make_case, error, op, shape, mask, dtype):
    case = make_case(shape, (4, 2), dtype, biases=[True, False])
    tokens = torch.tensor(mask, dtype=torch.bool)
    for given in (tokens, tokens.view(-1), tokens[..., None]):
        assert error(op(case, given), slow(*case.arguments(), tokens)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_mask_of_all_tokens_is_as_none(make_case, op, rows):
    case = make_case((rows, 40), (9,))
    with noting_served() as served:
        masked, plain = op(case, torch.ones(rows, dtype=torch.bool)), op(case)
    assert torch.equal(masked, plain)
    assert served[0] == served[1]


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
        (0.5, math.nan, False),
        (0.0, math.nan, False),
    ],
)
def test_channel_is_dropped_when_its_magnitude_is_at_most_the_threshold(x, threshold, dropped):
    found = dropped_channels(torch.tensor([[x]]), torch.tensor([threshold]))
    assert found.tolist() == [[dropped]]
    assert dropped_channels(torch.tensor([[x]]), torch.tensor([threshold]), torch.tensor([False])).tolist() == [[False]]


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("threshold", [0.0, 0.5, math.inf, math.nan])
@pytest.mark.parametrize("x", [0.0, 0.5, -0.5, 0.75, math.inf, -math.inf, math.nan])
def test_every_implementation_drops_the_same(x, threshold, rows):
    """By what comes out: the weight of the channel in question is one, and the other's input is none."""
    inputs = torch.tensor([[x, 0.0]]).expand(rows, 2).contiguous()
    weight, limits = torch.ones(2, 1).t(), torch.tensor([threshold, 0.0])
    meaning = reference(inputs, [weight], [None], [limits])
    y = sparse_linear(inputs, weight, None, limits, None)
    torch.testing.assert_close(y, meaning, equal_nan=True, rtol=0, atol=0)
    for kernel in (cpu_gather, cpu_embedding_bag):
        if kernel.supports(inputs, [weight]):
            y = kernel.sparse_linear(inputs, [weight], [None], [limits])
            torch.testing.assert_close(y, meaning, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_thresholds_are_compared_in_fp32(dtype):
    x = torch.tensor([[0.5]], dtype=dtype)
    assert dropped_channels(x, torch.tensor([0.5001])).item()  # 0.5 in the input's dtype
    assert not dropped_channels(x, torch.tensor([0.4999])).item()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_kept_nonfinite_input_spoils_its_own_row_only(make_case, op, rows, bad):
    case = make_case((rows, 16), (5, 3))
    case.x[-1, 4] = bad
    y = op(case)
    assert torch.isfinite(y[:-1]).all()
    assert not torch.isfinite(y[-1]).any()


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_threshold_gives_the_bias(make_case, op, rows, dtype):
    case = make_case((rows, 33), (5, 7, 5), dtype, biases=[True, False, True])
    case.thresholds = [torch.full((33,), math.inf) for _ in case.thresholds]
    y = op(case)
    bias = torch.cat([case.biases[0], torch.zeros(7, dtype=dtype), case.biases[2]])
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threshold_zero_equals_the_dense_linear(make_case, error, op, rows, dtype):
    case = make_case((rows, 129), (65,), dtype, threshold=0, biases=[True])
    dense = torch.nn.functional.linear(case.x.double(), case.weights[0].double(), case.biases[0].double())
    assert error(op(case), dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_no_tokens_give_no_rows(make_case, op, shape):
    case = make_case(shape, (3, 2))
    assert op(case).shape == (*shape[:-1], 5)
    assert op(case, torch.ones(shape[:-1], dtype=torch.bool)).shape == (*shape[:-1], 5)


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
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_strides_of_the_input_do_not_matter(make_case, error, op, rows, change):
    case = make_case((rows, 21), (6, 4), biases=[True, False])
    case.x = change(case.x)
    assert error(op(case), case.exact()) < TOLERANCE[torch.float32]


def test_every_argument_order_of_siblings_gives_the_same_parts(make_case):
    case = make_case((1, 24), (5, 3, 8), biases=[True, False, True])
    parts = sparse_siblings(*case.arguments(), None).split([5, 3, 8], dim=-1)
    for order in itertools.permutations(range(3)):
        picked = [[column[i] for i in order] for column in (case.weights, case.biases, case.thresholds)]
        y = sparse_siblings(case.x, *picked, None)
        assert torch.equal(y, torch.cat([parts[i] for i in order], dim=-1))


# What is changed of good arguments, and what the error says.
BAD = {
    "weight of other channels": (
        lambda a: a | {"weight": torch.zeros(4, 5)},
        r"x is \[2, 6\], the weight \[4, 5\] and the threshold \[6\]; expected x \[\.\.\., K\], weight \[N, K\], "
        r"threshold \[K\]",
    ),
    "weight of one dimension": (lambda a: a | {"weight": torch.zeros(6)}, r"the weight \[6\]"),
    "threshold of other channels": (lambda a: a | {"threshold": torch.zeros(4)}, r"the threshold \[4\]"),
    "threshold for each output": (lambda a: a | {"threshold": torch.zeros(1, 6)}, r"the threshold \[1, 6\]"),
    "scalar threshold": (lambda a: a | {"threshold": torch.tensor(0.5)}, r"the threshold \[\]"),
    "scalar input": (lambda a: a | {"x": torch.tensor(0.5)}, r"x is \[\]"),
    "bias of another size": (lambda a: a | {"bias": torch.zeros(3)}, r"the bias is \[3\]; expected \[4\]"),
    "bias of two dimensions": (lambda a: a | {"bias": torch.zeros(1, 4)}, r"the bias is \[1, 4\]; expected \[4\]"),
    "weight of another dtype": (
        lambda a: a | {"weight": torch.zeros(4, 6, dtype=torch.bfloat16)},
        r"x is torch\.float32, the weight torch\.bfloat16, the bias torch\.float32 and the threshold torch\.float32; "
        r"expected one dtype, and fp32 for the threshold",
    ),
    "bias of another dtype": (lambda a: a | {"bias": torch.zeros(4).double()}, r"the bias torch\.float64"),
    "threshold in half precision": (
        lambda a: a | {"threshold": torch.zeros(6).half()},
        r"the threshold torch\.float16",
    ),
    "tokens as numbers": (
        lambda a: a | {"tokens": torch.ones(2)},
        r"tokens is torch\.float32 \[2\]; expected bool, one for each row of x \[2, 6\]",
    ),
    "too many tokens": (lambda a: a | {"tokens": torch.ones(3, dtype=torch.bool)}, r"tokens is torch\.bool \[3\]"),
    "one token for all": (lambda a: a | {"tokens": torch.ones(1, dtype=torch.bool)}, r"tokens is torch\.bool \[1\]"),
    "weight elsewhere": (
        lambda a: a | {"weight": torch.zeros(4, 6, device="meta")},
        r"x is on cpu, the weight on meta, the threshold on cpu; expected one device: move the whole model by "
        r"model\.to\(device\)",
    ),
    "threshold elsewhere": (lambda a: a | {"threshold": torch.zeros(6, device="meta")}, r"the threshold on meta"),
    "bias elsewhere": (lambda a: a | {"bias": torch.zeros(4, device="meta")}, "expected one device"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("fake", [False, True])
def test_arguments_that_do_not_fit_are_refused(change, message, fake):
    good = {
        "x": torch.ones(2, 6), "weight": torch.ones(4, 6), "bias": torch.ones(4),
        "threshold": torch.ones(6), "tokens": torch.ones(2, dtype=torch.bool),
    }  # fmt: skip
    sparse_linear(*good.values())
    x, weight, bias, threshold, tokens = change(good).values()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        with pytest.raises(ValueError, match=message):
            sparse_linear(x, weight, bias, threshold, tokens)
        with pytest.raises(ValueError, match=message):
            sparse_siblings(x, [weight], [bias], [threshold], tokens)


@pytest.mark.parametrize("tokens", [None, [True, False, True]], ids=["all", "some"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 3, 7)], ids=str)
def test_gradient(make_case, shape, bias, tokens):
    case = make_case(shape, (4,), torch.float64, biases=[bias])
    (weight,), (given_bias,), (threshold,) = case.weights, case.biases, case.thresholds
    assert ((case.x.abs() - threshold).abs() > 1e-3).all()  # finite differences stay on one side
    mask = None if tokens is None else torch.tensor(tokens)
    inputs = [t if t is None else t.clone().requires_grad_() for t in (case.x, weight, given_bias)]
    assert torch.autograd.gradcheck(lambda *each: sparse_linear(*each, threshold, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda *each: sparse_linear(*each, threshold, mask), inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_are_those_that_are_asked_for(make_case, needed):
    case = make_case((2, 7), (4,), biases=[True])
    inputs = [
        t.clone().requires_grad_(need)
        for t, need in zip((case.x, case.weights[0], case.biases[0]), needed, strict=True)
    ]
    expected = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    sparse_linear(*inputs, case.thresholds[0], None).sin().sum().backward()
    reference(expected[0], [expected[1]], [expected[2]], case.thresholds).sin().sum().backward()
    for ours, theirs in zip(inputs, expected, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_through_the_fast_kernel_is_that_of_the_meaning(make_case, dtype):
    case = make_case((1, 33), (5,), dtype, biases=[True])
    assert choose(case.x, case.weights).function is not None
    grads = []
    for function in (lambda x: sparse_linear(x, *column(case), None), lambda x: reference(x, *case.arguments()[1:])):
        x = case.x.clone().requires_grad_()
        function(x).float().square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=5e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert (grads[0] == 0).eq(dropped_channels(case.x, case.thresholds[0])).all()


def column(case, i=0):
    return case.weights[i], case.biases[i], case.thresholds[i]


@pytest.mark.parametrize(
    ("rows", "dtype", "input_major", "name", "reason"),
    [
        (1, torch.float32, True, *cpu_gather.choice()[:2]),
        (8, torch.float32, True, *cpu_gather.choice()[:2]),
        (9, torch.float32, True, "dense_product", "9 tokens of torch.float32 on cpu"),
        (1, torch.bfloat16, True, *cpu_gather.choice()[:2]),
        (9, torch.bfloat16, True, "dense_product", "9 tokens of torch.bfloat16 on cpu"),
        (1, torch.float16, True, *cpu_gather.choice()[:2]),
        (1, torch.float64, True, "dense_product", "1 tokens of torch.float64 on cpu"),
        (1, torch.float32, False, "dense_product", "rows of Wᵀ are not contiguous"),
        (0, torch.float32, True, "dense_product", "0 tokens of torch.float32 on cpu"),
    ],
)
def test_choice_of_implementation(make_case, rows, dtype, input_major, name, reason):
    case = make_case((rows, 12), (8, 4), dtype, input_major=input_major)
    functions = {"cpu_gather": cpu_gather.sparse_linear, "dense_product": None}
    assert choose(case.x, case.weights) == (name, reason, functions[name])
    with noting_served() as served:
        sparse_siblings(*case.arguments(), None)
    assert [(found.implementation, found.reason) for found in served] == [(name, reason)]


@pytest.mark.parametrize(
    ("rows", "dtype", "input_major", "name"),
    [
        (1, torch.bfloat16, True, "gpu_gather"),
        (1, torch.float32, True, "gpu_gather"),
        (2, torch.bfloat16, True, "gpu_masked"),
        (8, torch.float16, True, "gpu_masked"),
        (16, torch.bfloat16, True, "gpu_masked"),
        (17, torch.bfloat16, True, "dense_product"),
        (2, torch.float32, True, "dense_product"),
        (2, torch.bfloat16, False, "dense_product"),
    ],
    ids=str,
)
def test_choice_on_a_gpu(monkeypatch, rows, dtype, input_major, name):
    monkeypatch.setattr("was_fx.kernels.parts.triton_parts._capability", lambda _: (9, 0))
    with FakeTensorMode():
        x = torch.empty(rows, 1, 12, dtype=dtype, device="cuda:0")
        weight = torch.empty((12, 8) if input_major else (8, 12), dtype=dtype, device="cuda:0")
        weight = weight.t() if input_major else weight
        assert choose(x, [weight, weight]).name == name
        assert choose(x, [weight], torch.ones(rows, dtype=torch.bool, device="cuda:0")).name == "dense_product"


def test_tokens_that_keep_channels_go_through_a_dense_product(make_case):
    case = make_case((2, 12), (8, 4))
    tokens = torch.tensor([True, False])
    assert choose(case.x, case.weights, tokens) == ("dense_product", "some tokens keep every channel", None)
    with noting_served() as served:
        sparse_siblings(*case.arguments(), tokens)
    assert [found.reason for found in served] == ["some tokens keep every channel"]


def test_one_sibling_that_lies_otherwise_is_enough_for_a_dense_product(make_case):
    case = make_case((1, 12), (8, 4))
    case.weights[1] = case.weights[1].contiguous()
    assert choose(case.x, case.weights)[:2] == ("dense_product", "rows of Wᵀ are not contiguous")


@pytest.mark.parametrize("input_major", [True, False])
def test_choosing_reads_no_values_and_notes_nothing(make_case, input_major):
    case = make_case((1, 12), (8, 4), input_major=input_major)
    before = [(t.data_ptr(), t.stride(), t.clone(), t._version) for t in (case.x, *case.weights)]
    with noting_served() as served:
        first = choose(case.x, case.weights)
        assert choose(case.x, case.weights) == first
    assert served == []
    for tensor, (place, stride, value, version) in zip((case.x, *case.weights), before, strict=True):
        assert (tensor.data_ptr(), tensor.stride(), tensor._version) == (place, stride, version)
        assert torch.equal(tensor, value)
    with FakeTensorMode() as mode:  # a fake tensor has no values to read
        assert choose(mode.from_tensor(case.x), [mode.from_tensor(weight) for weight in case.weights]) == first


OPCHECKS = [
    ((1, 24), torch.float32, None),
    ((1, 1, 24), torch.bfloat16, None),
    ((2, 1, 24), torch.float32, None),
    ((2, 9, 24), torch.float32, [[False] * 4 + [True] * 5] * 2),
    ((24,), torch.float32, None),
]


@pytest.mark.parametrize(("shape", "dtype", "tokens"), OPCHECKS, ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_op_passes_opcheck(make_case, shape, dtype, tokens, gradients, bias):
    case = make_case(shape, (5,), dtype, biases=[bias])
    x, (weight, given_bias, threshold) = case.x, column(case)
    if gradients:
        x, weight = x.requires_grad_(), weight.requires_grad_()
    mask = None if tokens is None else torch.tensor(tokens)
    torch.library.opcheck(sparse_linear, (x, weight, given_bias, threshold, mask))


@pytest.mark.parametrize(("shape", "dtype", "tokens"), OPCHECKS, ids=str)
def test_op_of_siblings_passes_opcheck(make_case, shape, dtype, tokens):
    case = make_case(shape, (5, 5, 3), dtype, adjacent=True, biases=[True, False, True])
    mask = None if tokens is None else torch.tensor(tokens)
    torch.library.opcheck(sparse_siblings, (*case.arguments(), mask))


LAYOUTS = {
    "contiguous": lambda x: x,
    "every second": lambda x: torch.cat([x, x], dim=-1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 2 else x,
}


@pytest.mark.parametrize("shape", [(24,), (1, 24), (4, 9, 24)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_fake_result_has_shape_dtype_and_strides_of_the_real_one(make_case, op, shape, layout, bias):
    case = make_case(shape, (5,), torch.bfloat16, biases=[bias])
    case.x = LAYOUTS[layout](case.x)
    real = op(case)
    with FakeTensorMode() as mode:
        for name in ("weights", "biases", "thresholds"):
            setattr(case, name, [None if t is None else mode.from_tensor(t) for t in getattr(case, name)])
        case.x = mode.from_tensor(case.x)
        y = op(case)
    assert (y.shape, y.dtype, y.device, y.stride()) == (real.shape, real.dtype, real.device, real.stride())


@pytest.mark.parametrize("tokens", [False, True])
def test_fake_result_keeps_symbolic_sizes(make_case, op, tokens):
    case = make_case((2, 7, 24), (5, 3))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(case.x)
        for name in ("weights", "biases", "thresholds"):
            setattr(case, name, [None if t is None else mode.from_tensor(t) for t in getattr(case, name)])
        case.x = x
        y = op(case, x[..., 0] > 0 if tokens else None)
    assert y.shape[:2] == x.shape[:2]
    assert y.shape[2] == 8
    assert any(isinstance(size, torch.SymInt) for size in y.shape)

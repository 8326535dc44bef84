"""Gated products that list their output: as a model would write them."""

import math

import pytest
import torch

from was_fx.kernels.ops.gated_product_compact import (
    _FUNCTIONS,
    ACTIVATIONS,
    gated_product_compact,
    gated_product_compact_op,
    reference,
)

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def arguments(k, device, dtype=torch.float32, *, splits=2, biases=(False, False), activation="silu", gap=0):
    random = torch.Generator().manual_seed(k)

    def rand(*shape):
        return torch.randn(shape, generator=random).to(device)

    return [
        rand(splits, 1, 2 * k + 2 * gap),
        [gap, k + gap],
        [rand(k).to(dtype) if bias else None for bias in biases],
        rand(k).abs() / 2,
        activation,
        dtype,
    ]


def assert_alike(case, kept):
    partial, (gate_start, up_start), biases, threshold, activation, dtype = case
    x, index, count = gated_product_compact(*case)
    k = len(threshold)
    total = partial.sum(0)
    gate, up = (
        (total[:, start : start + k] + (0 if bias is None else bias)).to(dtype).double()
        for start, bias in zip((gate_start, up_start), biases, strict=True)
    )
    exact = _FUNCTIONS[activation](gate).to(dtype).double() * up
    assert (x.shape, x.dtype) == ((1, k), dtype)
    torch.testing.assert_close(x.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert kept(index, count) == (~(x[0].abs() <= threshold)).nonzero().flatten().tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(kept, device, dtype, activation):
    assert_alike(arguments(70, device, dtype, activation=activation), kept)


@pytest.mark.parametrize("k", [1, 3, 16, 33, 1000, 1025, 2500])
def test_any_width(kept, device, k):
    assert_alike(arguments(k, device), kept)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)], ids=str)
def test_parts_and_biases_are_added(kept, device, dtype, splits, biases):
    assert_alike(arguments(30, device, dtype, splits=splits, biases=biases), kept)


def test_gate_and_up_lie_anywhere_in_the_product(kept, device):
    case = arguments(30, device, gap=5)
    assert_alike(case, kept)
    case[1].reverse()
    assert_alike(case, kept)


@pytest.mark.parametrize(("threshold", "keeps"), [(math.inf, 0), (-1.0, 50)])
def test_nothing_or_everything_is_kept(kept, device, threshold, keeps):
    case = arguments(50, device)
    case[3] = torch.full((50,), threshold, device=device)
    _, index, count = gated_product_compact(*case)
    assert kept(index, count) == list(range(keeps))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("where", [4, 24], ids=["gate", "up"])
def test_nonfinite_and_huge_inputs_behave_as_in_the_dense_product(kept, device, activation, bad, where):
    case = arguments(20, device, splits=1, activation=activation)
    case[0][..., where] = bad
    ours, theirs = gated_product_compact(*case), reference(*case)
    if activation == "gelu" and bad == math.inf and where == 4:
        theirs[0][0, 4] = case[0][0, 0, 24] * math.inf  # torch's vectorised gelu(∞) is NaN on a CPU
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert kept(*ours[1:]) == kept(*theirs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_as_the_model_does(dtype):
    case = arguments(40, "cpu", dtype, biases=(True, False))
    total = case[0].sum(0)
    gate, up = (total[:, :40] + case[2][0].float()).to(dtype), total[:, 40:].to(dtype)
    assert torch.equal(reference(*case)[0], torch.nn.functional.silu(gate) * up)


def test_op_passes_opcheck(device):
    case = arguments(40, device, biases=(True, False))
    torch.library.opcheck(gated_product_compact_op, tuple(case), test_utils=("test_schema", "test_faketensor"))

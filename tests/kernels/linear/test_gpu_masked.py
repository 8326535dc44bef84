"""All steps of a sparse Linear for a few tokens, against fp64, and when they are chosen."""

import math

import pytest
import torch

from was_fx.kernels.linear import gpu_masked
from was_fx.kernels.linear.masked_gemm import MaskedGemmConfig
from was_fx.kernels.linear.sparse_linear import reference

pytestmark = pytest.mark.usefixtures("loops")

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    config = MaskedGemmConfig(rows=32, columns=64, splits=2, warps=4, stages=3)
    monkeypatch.setattr("was_fx.kernels.linear.gpu_masked.masked_gemm_config", lambda *_: config)
    monkeypatch.setattr("was_fx.kernels.linear.masked_gemm.masked_gemm_config", lambda *_: config)


def run(case, device):
    arguments = (
        case.x.to(device),
        [weight.t().to(device).t() for weight in case.weights],
        [None if bias is None else bias.to(device) for bias in case.biases],
        [threshold.to(device) for threshold in case.thresholds],
    )
    assert gpu_masked.supports(*arguments[:2])
    y, meaning = gpu_masked.sparse_linear(*arguments), reference(*arguments)
    assert (y.shape, y.dtype) == (meaning.shape, meaning.dtype)
    return y.cpu()


@pytest.mark.parametrize("shape", [(2, 1, 50), (1, 3, 50), (2, 4, 50), (16, 50)], ids=str)
@pytest.mark.parametrize("outputs", [(20,), (5, 3, 5, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_number_of_siblings_and_few_tokens(make_case, error, device, dtype, shape, outputs):
    case = make_case(shape, outputs, dtype, biases=[i % 2 == 0 for i in range(len(outputs))])
    assert error(run(case, device), case.exact()) < TOLERANCE[dtype]


def test_strides_of_the_input_do_not_matter(make_case, error, device):
    case = make_case((4, 50), (20,), torch.float16)
    case.x = case.x.t().contiguous().t()
    assert error(run(case, device), case.exact()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nothing_kept_gives_the_bias(make_case, device, dtype):
    case = make_case((4, 33), (5, 7), dtype, biases=[True, False])
    case.thresholds = [torch.full((33,), math.inf) for _ in case.thresholds]
    expected = torch.cat([case.biases[0], torch.zeros(7, dtype=dtype)]).expand(4, -1)
    assert torch.equal(run(case, device), expected)

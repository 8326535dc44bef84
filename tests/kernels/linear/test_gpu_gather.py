"""All steps of a sparse Linear for one token, against fp64."""

import math

import pytest
import torch

from was_fx.kernels.linear import gpu_gather
from was_fx.kernels.linear.sparse_linear import reference
from was_fx.kernels.parts.gemv_config import GemvConfig

pytestmark = pytest.mark.usefixtures("loops")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    config = GemvConfig(rows=32, columns=64, splits=2, warps=4)
    monkeypatch.setattr("was_fx.kernels.linear.gpu_gather.gemv_config", lambda *_: config)
    monkeypatch.setattr("was_fx.kernels.linear.gather_gemv.gemv_config", lambda *_: config)


def run(case, device):
    arguments = (
        case.x.to(device),
        [weight.t().to(device).t() for weight in case.weights],
        [None if bias is None else bias.to(device) for bias in case.biases],
        [threshold.to(device) for threshold in case.thresholds],
    )
    assert gpu_gather.supports(*arguments[:2])
    y, meaning = gpu_gather.sparse_linear(*arguments), reference(*arguments)
    assert (y.shape, y.dtype) == (meaning.shape, meaning.dtype)
    return y.cpu()


@pytest.mark.parametrize("shape", [(50,), (1, 50), (1, 1, 50)], ids=str)
@pytest.mark.parametrize("outputs", [(20,), (5, 3, 5, 3, 5)], ids=str)
def test_any_number_of_siblings(make_case, error, device, dtype, shape, outputs):
    case = make_case(shape, outputs, dtype, biases=[i % 2 == 0 for i in range(len(outputs))])
    assert error(run(case, device), case.exact()) < TOLERANCE[dtype]


def test_nothing_kept_gives_the_bias(make_case, device, dtype):
    case = make_case((1, 33), (5, 7), dtype, biases=[True, False])
    case.thresholds = [torch.full((33,), math.inf) for _ in case.thresholds]
    expected = torch.cat([case.biases[0], torch.zeros(7, dtype=dtype)])[None]
    assert torch.equal(run(case, device), expected)

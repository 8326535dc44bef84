"""All steps of a sparse Linear for one token and for a few, against fp64."""

import math

import pytest
import torch

from was_fx.kernels.linear import gather_gemv, gpu_linear, masked_gemm
from was_fx.kernels.linear.masked_gemm import MaskedGemmConfig
from was_fx.kernels.linear.sparse_linear import reference
from was_fx.kernels.parts.gemv_config import GemvConfig

pytestmark = pytest.mark.usefixtures("loops")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ONE = [(50,), (1, 50), (1, 1, 50)]
FEW = [(2, 1, 50), (1, 3, 50), (2, 4, 50), (16, 50)]
ROWS = [(dtype, shape) for dtype in TOLERANCE for shape in ONE]
ROWS += [(dtype, shape) for dtype in masked_gemm.DTYPES for shape in FEW]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    one = GemvConfig(rows=32, columns=64, splits=2, warps=4)
    few = MaskedGemmConfig(rows=32, columns=64, splits=2, warps=4, stages=3)
    for module in (gpu_linear, gather_gemv):
        monkeypatch.setattr(module, "gemv_config", lambda *_: one)
    for module in (gpu_linear, masked_gemm):
        monkeypatch.setattr(module, "masked_gemm_config", lambda *_: few)


def run(case, device):
    arguments = (
        case.x.to(device),
        [weight.t().to(device).t() for weight in case.weights],
        [None if bias is None else bias.to(device) for bias in case.biases],
        [threshold.to(device) for threshold in case.thresholds],
    )
    one = gather_gemv.supports(*arguments[:2])
    assert one == (case.x.numel() == case.x.shape[-1])
    assert one or masked_gemm.supports(*arguments[:2])
    y, meaning = (gpu_linear.gathered if one else gpu_linear.masked)(*arguments), reference(*arguments)
    assert (y.shape, y.dtype) == (meaning.shape, meaning.dtype)
    return y.cpu()


@pytest.mark.parametrize(("dtype", "shape"), ROWS, ids=str)
@pytest.mark.parametrize("outputs", [(20,), (5, 3, 5, 3, 5)], ids=str)
def test_any_number_of_siblings(make_case, error, device, dtype, shape, outputs):
    case = make_case(shape, outputs, dtype, biases=[i % 2 == 0 for i in range(len(outputs))])
    assert error(run(case, device), case.exact()) < TOLERANCE[dtype]


def test_strides_of_the_input_do_not_matter(make_case, error, device):
    case = make_case((4, 50), (20,), torch.float16)
    case.x = case.x.t().contiguous().t()
    assert error(run(case, device), case.exact()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", masked_gemm.DTYPES, ids=str)
def test_nothing_kept_gives_the_bias(make_case, device, dtype, tokens):
    case = make_case((tokens, 33), (5, 7), dtype, biases=[True, False])
    case.thresholds = [torch.full((33,), math.inf) for _ in case.thresholds]
    expected = torch.cat([case.biases[0], torch.zeros(7, dtype=dtype)]).expand(tokens, -1)
    assert torch.equal(run(case, device), expected)

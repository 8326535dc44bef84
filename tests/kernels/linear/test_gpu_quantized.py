"""All steps of a Linear with quantised weights for few tokens on a GPU, against its meaning."""

import pytest

from was_fx.kernels.linear import gpu_quantized
from was_fx.kernels.linear.quantized_linear import reference
from was_fx.kernels.parts.gemv_config import GemvConfig
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.kernels.quantized.rows import QuantizedRows

pytestmark = pytest.mark.usefixtures("loops")


@pytest.fixture(params=[1, 2], ids=["1 split", "2 splits"])
def splits(request, monkeypatch):
    config = GemvConfig(rows=32, columns=64, splits=request.param, warps=4)
    monkeypatch.setattr("was_fx.kernels.linear.gpu_quantized.gemv_config", lambda *_: config)
    monkeypatch.setattr("was_fx.kernels.linear.gather_quantized_gemv.gemv_config", lambda *_: config)


def arguments(case, quantize, device):
    stored = [quantize(weight.float()) for weight in case.weights]
    rows = [QuantizedRows(*(None if each is None else each.to(device) for each in vars(of).values())) for of in stored]
    biases = [None if bias is None else bias.to(device) for bias in case.biases]
    return case.x.to(device), rows, biases, [threshold.to(device) for threshold in case.thresholds]


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("quantize", [quantize_int8, lambda w: quantize_int4("weight", w, 32)], ids=["int8", "int4"])
@pytest.mark.parametrize("kept", ["thresholds", "some", "every channel"])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 1, 50), (64,)), ((50,), (64, 32)), ((3, 50), (32,) * 5)], ids=str)
def test_any_weight_may_keep_every_channel(make_case, error, device, monkeypatch, quantize, kept, shape, outputs):
    case = make_case(shape, outputs, biases=[i % 2 == 0 for i in range(len(outputs))])
    x, rows, biases, limits = arguments(case, quantize, device)
    limits = [None if kept == "every channel" or (kept == "some" and i == 0) else t for i, t in enumerate(limits)]
    if kept == "every channel" and x.numel() == x.shape[-1]:
        monkeypatch.setattr(gpu_quantized, "compact", lambda *_: pytest.fail("nothing is to be listed"))
    assert gpu_quantized.supports(x, rows)
    y, meaning = gpu_quantized.sparse_linear(x, rows, biases, limits), reference(x, rows, biases, limits)
    assert y.dtype == meaning.dtype
    assert error(y.cpu(), meaning.double().cpu()) < (1e-4 if device == "cpu" else 5e-3)

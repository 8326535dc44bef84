"""A quantised weight written out in one pass is what its rows say."""

import pytest
import torch

from was_fx.kernels.linear.gpu_write_out import supports, write_out
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8


@pytest.mark.parametrize(("outputs", "group"), [(5, None), (300, None), (32, 32), (1152, 64), (640, 128)])
@pytest.mark.parametrize("channels", [1, 37])
def test_every_number_is_that_of_the_rows(device, dtype, channels, outputs, group):
    weight = torch.randn(outputs, channels, generator=torch.Generator().manual_seed(0)).to(device)
    rows = quantize_int4("weight", weight, group) if group else quantize_int8(weight)
    assert supports(rows, dtype)
    # Products may be rounded once or twice before they are rounded to the dtype.
    torch.testing.assert_close(
        write_out(rows, dtype), rows.dequantize(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7
    )


def test_a_strided_weight_is_left_to_plain_pytorch(device):
    rows = quantize_int8(torch.randn(64, 8, device=device))
    strided = type(rows)(rows.codes[:, ::2], rows.scales[::2], None)
    assert not supports(strided, torch.float32)

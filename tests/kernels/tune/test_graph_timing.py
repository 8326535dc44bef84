"""Times of GPU work."""

import pytest
import torch

from was_fx.kernels.tune.graph_timing import capture, microseconds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_more_work_takes_more_time():
    x = torch.randn(4096, 4096, device="cuda")
    small, large = x[:64, :64].contiguous(), x
    graphs = [capture([lambda each=each: each @ each] * 3) for each in (small, large)]
    short, long = microseconds(graphs, 3)
    assert 0 < short < long

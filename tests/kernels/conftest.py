"""Random arguments of the ops."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Case:
    """Arguments of `was::sparse_linear`."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    thresholds: list[Tensor]

    def arguments(self) -> tuple:
        return self.x, self.weights, self.biases, self.thresholds

    def exact(self) -> Tensor:
        """y in fp64: the channels that the op must keep, and no rounding."""
        parts = []
        for weight, bias, threshold in zip(self.weights, self.biases, self.thresholds, strict=True):
            dropped = self.x.float().abs() <= threshold
            y = self.x.double().masked_fill(dropped, 0) @ weight.double().t()
            parts.append(y if bias is None else y + bias.double())
        return torch.cat(parts, dim=-1)


def _make(
    shape=(1, 64),
    outputs=(48,),
    dtype=torch.float32,
    *,
    threshold=0.6745,
    input_major=True,
    adjacent=False,
    adjacent_thresholds=False,
    biases=None,
    seed=0,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    k = shape[-1]
    x = torch.randn(shape, generator=random).to(dtype)
    tables = [(torch.randn(k, n, generator=random) / k**0.5).to(dtype) for n in outputs]
    if adjacent:
        storage = torch.cat([table.flatten() for table in tables])
        tables = [part.view_as(table) for part, table in zip(storage.split([t.numel() for t in tables]), tables)]  # noqa: B905
    weights = [table.t() if input_major else table.t().contiguous() for table in tables]
    spread = (
        2 * threshold * torch.rand(len(outputs), k, generator=random) if threshold else torch.zeros(len(outputs), k)
    )
    thresholds = list(spread) if adjacent_thresholds else [row.clone() for row in spread]
    with_bias = [False] * len(outputs) if biases is None else biases
    made = [torch.randn(n, generator=random).to(dtype) if b else None for n, b in zip(outputs, with_bias, strict=True)]
    return Case(x, weights, made, thresholds)


@pytest.fixture(scope="session")
def make_case():
    """Builds a `Case`: x of `shape` [..., K], one Linear for each of `outputs`, about half of the channels dropped."""
    return _make


@pytest.fixture(scope="session")
def error():
    """Largest error of y relative to the largest |y|."""

    def relative(y: Tensor, exact: Tensor) -> float:
        assert y.shape == exact.shape
        return float((y.double() - exact).abs().max() / exact.abs().max())

    return relative


CUDA = torch.cuda.is_available()


@pytest.fixture
def device() -> str:
    """Where Triton's kernels run: natively on a GPU, else by its interpreter."""
    return "cuda" if CUDA else "cpu"


# The interpreter does not calculate in bf16 as a GPU does.
@pytest.fixture(params=[torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])], ids=str)
def dtype(request) -> torch.dtype:
    """Dtypes of the Triton kernels."""
    return request.param


@pytest.fixture(scope="session")
def kept():
    """The channels that a list holds for the sibling g, in order."""

    def channels(index: Tensor, count: Tensor, g: int = 0) -> list[int]:
        pairs = zip(index[g].tolist(), count[g].tolist(), strict=True)
        return [channel for segment, n in pairs for channel in segment[:n]]

    return channels

"""The kernels of this machine against the meaning of their ops in plain PyTorch, on a few small products."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import dense_linear, quantized_linear, sparse_linear
from was_fx.kernels.quantized.fit import quantize_int4, quantize_int8
from was_fx.schedules.progress import Progress, report

# (tokens, K, N): a usual one, sizes that no block divides, several tokens, a prompt.
SHAPES = ((1, 512, 512), (1, 1000, 416), (4, 768, 2048), (64, 512, 512))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("int8", "int4")
# Largest difference, relative to the largest output: of roundings to bf16, of fp32 sums in another order, and of int4,
# whose kernels on a CPU round x to 8 bits of the largest of sixteen channels.
_TOLERANCES = {"bf16": 1e-2, "fp32": 1e-4, "int4": 2e-2}
_REPETITIONS = 10


@dataclass(frozen=True)
class SelfTest:
    """One product.

    Attributes:
        weights: "bf16", "fp32", "int8" or "int4".
        dtype: of the activations: "bf16" or "fp32".
        tokens: that it was made for.
        shape: (N, K).
        implementation: what computed it.
        error: largest difference from the meaning in fp32, relative to its largest output; None if it failed.
        tolerance: what it may be.
        ms: of one call, the fastest of some; None if it failed.
        failure: the exception's message; "" if there was none.
    """

    weights: str
    dtype: str
    tokens: int
    shape: tuple[int, int]
    implementation: str
    error: float | None
    tolerance: float
    ms: float | None
    failure: str

    @property
    def passed(self) -> bool:
        """Whether it gave what it should."""
        return self.error is not None and self.error <= self.tolerance


@torch.no_grad()
def self_test(device: torch.device, progress: Progress | None = None) -> list[SelfTest]:
    """Half of the channels dropped, in weights of bf16, fp32, int8 and int4, and dense products; takes seconds.

    Args:
        device: where.
        progress: called with (products done, all products).
    """
    cases = [(weights, dtype, shape) for dtype in DTYPES for weights in (dtype, *FORMATS, "dense") for shape in SHAPES]
    rows = []
    for done, case in enumerate(cases):
        report(progress, done, len(cases))
        rows.append(_tried(*case, device))
    report(progress, len(cases), len(cases))
    return rows


def _tried(weights: str, dtype: str, shape: tuple[int, int, int], device: torch.device) -> SelfTest:
    tokens, channels, outputs = shape
    named = dtype if weights == "dense" else weights
    label, size = f"{named} dense" if weights == "dense" else named, (outputs, channels)
    implementation, tolerance = "", _TOLERANCES["int4" if weights == "int4" else dtype]
    try:
        implementation, run, meaning = _product(weights, DTYPES[dtype], shape, device)
        expected = meaning()
        error = ((run().float() - expected).abs().max() / expected.abs().max()).item()
        return SelfTest(label, dtype, tokens, size, implementation, error, tolerance, _time(run, device), "")
    except Exception as error:  # whatever a compiler or a driver raises is what is looked for
        text = " ".join(str(error).split()) or type(error).__name__
        return SelfTest(label, dtype, tokens, size, implementation, None, tolerance, None, text[:300])


def _product(
    weights: str, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device
) -> tuple[str, Callable[[], Tensor], Callable[[], Tensor]]:
    """What serves a product, the product, and its meaning in fp32."""
    tokens, channels, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator).to(device, dtype)
    weight = (torch.randn(outputs, channels, generator=generator) / channels**0.5).to(device, dtype)
    bias = torch.randn(outputs, generator=generator).to(device, dtype)
    threshold = x.abs().float().median().expand(channels).contiguous()
    if weights == "dense":
        choice = dense_linear.choose(x, weight)
        meaning = lambda: torch.nn.functional.linear(x.float(), weight.float(), bias.float())  # noqa: E731
        return choice.name, lambda: dense_linear.compute(x, weight, bias), meaning
    if weights in FORMATS:
        rows = quantize_int8(weight) if weights == "int8" else quantize_int4("the weight", weight)
        arguments = ([rows], [bias], [threshold])
        return (
            quantized_linear.choose(x, [rows]).name,
            lambda: quantized_linear.compute(x, *arguments),
            lambda: quantized_linear.reference(x.float(), [rows], [bias.float()], [threshold]),
        )
    weight = weight.t().contiguous().t()
    return (
        sparse_linear.choose(x, [weight]).name,
        lambda: sparse_linear.compute(x, [weight], [bias], [threshold]),
        lambda: sparse_linear.reference(x.float(), [weight.float()], [bias.float()], [threshold]),
    )


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds, the least of some calls: others may use the machine too."""

    def times() -> Iterator[float]:
        for _ in range(_REPETITIONS):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield 1e3 * (time.perf_counter() - begin)

    return min(times())

"""Measure which tile sizes of the products with listed rows are fastest for a shape on this GPU."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from was_fx.kernels.linear import gather_experts, gather_gemv, gather_quantized_gemv
from was_fx.kernels.ops.compact import reference as compaction
from was_fx.kernels.ops.compact_experts import compact_experts
from was_fx.kernels.parts.gemv_config import ExpertsShape, Format, GemvConfig, LinearsShape, Shape, multiprocessors
from was_fx.kernels.quantized.rows import INT4
from was_fx.kernels.tune.graph_timing import capture, microseconds

SPARSITIES = (0.4, 0.5, 0.6, 0.75)

# Weights that calls take turns with, so that none is read from the L2 cache.
ROTATED_BYTES = 256 << 20
MOST_COPIES = 64

# Outputs of an input channel that share a step and a zero point of int4, where tile sizes for it are measured.
GROUP = 32

# What each further split costs the kernel that adds the parts, per 4096 output channels: measured for RMSNorm, whose
# programs each read all of them. Products that several programs read (gate and up) cost less.
MICROSECONDS_PER_SPLIT = 0.2

# Where no kernel of ours adds the parts, Inductor adds up to eight where it reads them, and more by a kernel of 7 µs.
MOST_FOR_INDUCTOR = 8

# Candidates timed together, in turns.
BATCH = 16


def candidates(shape: Shape, multiprocessors: int) -> list[GemvConfig]:
    """Configurations worth measuring for a shape, on a GPU with so many multiprocessors."""
    channels, sizes = shape.channels, shape.sizes
    most = most_splits(shape)
    found = []
    for rows, columns, warps in tiles_of(shape.format):
        if columns > 2 * triton.next_power_of_2(max(sizes)):
            continue
        tiles = sum(triton.cdiv(n, columns) for n in sizes)
        for programs in (1, 2, 3, 4) if warps == 4 else (2, 4, 8):
            splits = max(1, round(programs * multiprocessors / tiles))
            if splits <= most and splits * 32 <= max(channels, 32):
                found.append(GemvConfig(rows, columns, splits, warps))
    return list(dict.fromkeys(found))


def most_splits(shape: Shape) -> int:
    """The most splits worth measuring for a shape."""
    return 16 if isinstance(shape, LinearsShape) and len(shape.sizes) < 3 else MOST_FOR_INDUCTOR


def tiles_of(format: Format) -> Iterator[tuple[int, int, int]]:
    """Rows, columns and warps worth measuring."""
    if isinstance(format, torch.dtype):
        for rows, columns in itertools.product((64, 128, 256), (32, 64, 128)):  # with 8 warps none was faster
            if 4096 <= rows * columns <= 16384:
                yield rows, columns, 4
        return
    # Each thread holds sixteen bytes of four, eight or sixteen rows.
    for warps, width, steps in itertools.product((2, 4), (64, 128, 256), (4, 8, 16)):
        rows = steps * 512 * warps // width
        if 32 <= rows <= 512:
            yield rows, width * 2 if format == INT4 else width, warps


def random_weights(shape: LinearsShape, generator: torch.Generator) -> tuple[list[Tensor], ...]:
    """What `gather_gemv` or `gather_quantized_gemv` takes for the weights of a shape, in its order.

    Outputs are about as large as inputs. The device is the generator's.
    """
    channels, sizes, format = shape
    device, scale = generator.device, channels**-0.5
    if isinstance(format, torch.dtype):
        normal = (torch.randn(channels, n, device=device, generator=generator) for n in sizes)
        return ([each.mul_(scale).to(format).t() for each in normal],)

    def random_bytes(*size: int) -> Tensor:
        return torch.randint(1, 256, size, dtype=torch.uint8, device=device, generator=generator)

    if format == INT4:
        scales = torch.full((channels,), scale / 960, device=device)  # 960: of what random codes and groups stand for
        groups = [random_bytes(channels, n // GROUP, 2) for n in sizes]
        return [random_bytes(channels, n // 2) for n in sizes], [scales] * len(sizes), groups
    codes = [random_bytes(channels, n + -n % 32).view(torch.int8) for n in sizes]
    return codes, [torch.full((n,), scale / 74, device=device) for n in sizes], []


def product_of(shape: Shape) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What multiplies by weights of a shape, and its meaning in plain PyTorch."""
    plain = isinstance(shape.format, torch.dtype)
    if isinstance(shape, ExpertsShape):
        if plain:
            return gather_experts.gather_experts, gather_experts.reference
        return gather_experts.gather_quantized_experts, gather_experts.quantized_reference
    if plain:
        return gather_gemv.gather_gemv, gather_gemv.reference
    return gather_quantized_gemv.gather_quantized_gemv, gather_quantized_gemv.reference


def _cases(shape: Shape, sparsity: float, most: int) -> list[tuple[Any, ...]]:
    """Arguments of the product before its splits, of so many calls or as many as fill ROTATED_BYTES."""
    format = shape.format
    dtype = format if isinstance(format, torch.dtype) else torch.bfloat16
    generator = torch.Generator("cuda").manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    size = 0
    while len(cases) < min(most, 2) or (len(cases) < most and size < ROTATED_BYTES):
        x = torch.randn(1, shape.channels, device="cuda", generator=generator).to(dtype)
        threshold = x.float().abs().flatten().kthvalue(max(1, round(sparsity * shape.channels))).values
        threshold = threshold.expand(shape.channels).contiguous() if sparsity else torch.full_like(x[0].float(), -1.0)
        if isinstance(shape, ExpertsShape):
            case, weights = _experts_case(shape, x, threshold, generator)
        else:
            case, weights = _linears_case(shape, x, threshold, generator)
        size += sum(tensor.nbytes for tensor in weights if tensor is not None)
        cases.append(case)
    return cases


def _linears_case(
    shape: LinearsShape, x: Tensor, threshold: Tensor, generator: torch.Generator
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """Arguments of a product, and the weights among them."""
    thresholds = [threshold] * len(shape.sizes)
    weights = random_weights(shape, generator)
    index, count = compaction(x, thresholds, triton.next_power_of_2(shape.channels))
    limits = [] if isinstance(shape.format, torch.dtype) else [thresholds]
    return (x, index, count, *weights, *limits), [each for those in weights for each in those]


def _experts_case(
    shape: ExpertsShape, x: Tensor, threshold: Tensor, generator: torch.Generator
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """The same of as many experts as are chosen."""
    one = LinearsShape(shape.channels, (shape.outputs,), shape.format)
    parts = zip(*(random_weights(one, generator) for _ in shape.sizes), strict=True)  # of every expert
    stacked: list[Tensor | None] = []
    for part in parts:
        tensors = [each for those in part for each in those]
        if isinstance(shape.format, torch.dtype):
            stacked.append(torch.stack([each.mT for each in tensors]).mT)  # input-major
        else:
            stacked.append(torch.stack(tensors) if tensors else None)
    experts = torch.arange(shape.pairs, device="cuda")
    listed = compact_experts(x, threshold.expand(shape.pairs, -1).contiguous(), experts)
    return (x, *listed, *stacked, experts), stacked


@torch.no_grad()
def correct(shape: Shape, configs: Sequence[GemvConfig], case: tuple[Any, ...] | None = None) -> list[GemvConfig]:
    """Those of which the product is right: Triton 3.6 was seen to miscompile one of two hundred.

    Args:
        shape: of the weights.
        configs: to choose from.
        case: arguments of the product before its splits; by default random ones, half of whose channels are kept.
    """
    case = case or _cases(shape, 0.5, 1)[0]
    product, reference = product_of(shape)
    expected = reference(*case, 1).sum(0)
    found = []
    for config in configs:
        y = product(*case, config.splits, config).sum(0)
        if (y - expected).norm() <= 1e-3 * expected.norm():
            found.append(config)
    return found


@torch.no_grad()
def measure(shape: Shape, configs: Sequence[GemvConfig], sparsity: float, repetitions: int) -> list[float]:
    """Microseconds of each configuration at one sparsity, median of so many graph replays."""
    product, _ = product_of(shape)
    cases = _cases(shape, sparsity, MOST_COPIES)
    times: list[float] = []
    for first in range(0, len(configs), BATCH):
        graphs = [
            capture([partial(product, *case, config.splits, config) for case in cases])
            for config in configs[first : first + BATCH]
        ]
        times += microseconds(graphs, len(cases), repetitions)
    return times


def tune_shape(shape: Shape, sparsities: Sequence[float] = SPARSITIES) -> tuple[GemvConfig, dict[str, float]]:
    """The fastest configuration over several sparsities, and its microseconds at each.

    All candidates are timed at the middle one, the best dozen of them at every one.
    """
    outputs = 0 if isinstance(shape, LinearsShape) and len(shape.sizes) > 1 else sum(shape.sizes)
    configs = correct(shape, candidates(shape, multiprocessors(torch.device("cuda"))))

    def reading(config: GemvConfig) -> float:
        return MICROSECONDS_PER_SPLIT * config.splits * outputs / 4096

    middle = sorted(sparsities)[len(sparsities) // 2]
    first = measure(shape, configs, middle, 3)
    ranked = sorted(zip(first, configs, strict=True), key=lambda pair: pair[0] + reading(pair[1]))
    best = [config for _, config in ranked[:12]]
    times = {each: measure(shape, best, each, 9) for each in sparsities}
    totals = [sum(times[each][i] for each in sparsities) + len(sparsities) * reading(c) for i, c in enumerate(best)]
    winner = totals.index(min(totals))
    return best[winner], {f"{each:g}": round(times[each][winner], 2) for each in sparsities}

"""A chain of decoder blocks of a model's shape, of the kernels alone: what `tiles_in_chain.py` times."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from gpu_kernels import products
from torch import Tensor

from was_fx.kernels.ops.decode_attention import decode_attention
from was_fx.kernels.ops.gated_product_compact import gated_product_compact
from was_fx.kernels.ops.rms_norm_compact import rms_norm_compact
from was_fx.kernels.parts.arrivals import arrivals
from was_fx.kernels.parts.gemv_config import Format, GemvConfig, LinearsShape, gemv_config
from was_fx.kernels.parts.triton_parts import begin, launch_options, sum_partials
from was_fx.kernels.tune.graph_timing import capture, microseconds
from was_fx.kernels.tune.tile_sizes import most_splits, product_of, random_weights

SPARSITIES = (0.5, 0.75)
LENGTH, USED = 256, 160  # of a cache
# Of weights, as far as the model has blocks. A fourth is read at 75 %, well over the 50 MB of the L2 cache of an H200:
# little of it is still there at the next replay.
BYTES, LEAST_BLOCKS = 600e6, 4


@triton.jit
def _take_parts(  # stands for what adds the parts of qkv, rotates q and k, and writes the cache
    partial_ptr,  # [SPLITS, HEADS + 2 · SHARED] fp32
    q_ptr,  # [HEADS]
    k_ptr,  # [SHARED / D, L, D]
    v_ptr,
    place,
    L,
    HEADS,
    SHARED,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = HEADS + 2 * SHARED
    begin(PDL)
    y = sum_partials(partial_ptr, columns, columns < width, width, SPLITS).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + columns, y, mask=columns < HEADS)
    of_k, of_v = columns - HEADS, columns - HEADS - SHARED
    tl.store(k_ptr + (of_k // D * L + place) * D + of_k % D, y, mask=(of_k >= 0) & (of_k < SHARED))
    tl.store(v_ptr + (of_v // D * L + place) * D + of_v % D, y, mask=(of_v >= 0) & (of_v < SHARED))


class Chain:
    """Decoder blocks that decode one token, with random weights and thresholds of their own.

    Args:
        c: the model's configuration.
        format: of the weights.
        device: where; a CPU under Triton's interpreter.

    Attributes:
        shapes: of the products of a block, in their order.
        present: configurations in use for them.
        cases: arguments of each product of the first block, before its splits.
    """

    def __init__(self, c: Any, format: Format, device: str) -> None:
        self.device = torch.device(device)
        self.shapes = {name: LinearsShape(k, sizes, format) for name, (k, sizes) in products(c).items()}
        self.present = {
            name: gemv_config(self.device, format, shape.channels, shape.sizes) for name, shape in self.shapes.items()
        }
        generator = torch.Generator(device).manual_seed(0)
        quantised = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = format if isinstance(format, torch.dtype) else quantised
        rand = partial(torch.randn, generator=generator, device=device, dtype=self.dtype)

        def block() -> dict[str, tuple[list[Tensor], ...]]:
            return {name: random_weights(shape, generator) for name, shape in self.shapes.items()}

        self.weights = [block()]
        size = sum(w.nbytes for weights in self.weights[0].values() for each in weights for w in each)
        blocks = min(c.num_hidden_layers, max(LEAST_BLOCKS, math.ceil(BYTES / size)))
        self.weights += [block() for _ in range(blocks - 1)]
        self.heads, shared = c.num_attention_heads, c.num_key_value_heads
        self.width = self.shapes["o"].channels // self.heads
        self.norms = [{name: 1 + 0.1 * rand(c.hidden_size) for name in ("qkv", "gate_up")} for _ in range(blocks)]
        self.caches = [[rand(1, shared, LENGTH, self.width) for _ in range(2)] for _ in range(blocks)]
        self.mask = (torch.arange(LENGTH, device=device) < USED)[None, None, None]
        self.hidden = rand(1, c.hidden_size)
        self.counters = arrivals(self.hidden)
        most = max(most_splits(self.shapes["down"]), self.present["down"].splits)
        self.zeros = torch.zeros(most, 1, c.hidden_size, device=device)
        self.thresholds: dict[tuple[float, int, str], list[Tensor]] = {}
        self.cases: dict[str, tuple[Any, ...]] = {}
        for sparsity in SPARSITIES:
            self.run(self.present, sparsity)

    def take(self, block: int, parts: Tensor) -> Tensor:
        """q [1, H, 1, D], from the parts of qkv; k and v go to the cache."""
        q = parts.new_empty((1, self.heads, 1, self.width), dtype=self.dtype)
        heads, shared, _ = self.shapes["qkv"].sizes
        _take_parts[(triton.cdiv(heads + 2 * shared, 512),)](
            parts, q, *self.caches[block], USED - 1, LENGTH, heads, shared,
            D=self.width, SPLITS=parts.shape[0], BLOCK=512, **launch_options(q),
        )  # fmt: skip
        return q

    def listed(self, block: int, name: str, h: Tensor, parts: Tensor, thresholds: list[Tensor]) -> tuple[Tensor, ...]:
        """The residual; x [1, K] of a product and its list, from the parts of the product before."""
        if name == "o":
            scale = self.width**-0.5
            q = self.take(block, parts)
            y, *lists = decode_attention(q, *self.caches[block], self.mask, scale, thresholds, self.counters)
            return h, y.view(1, -1), *lists
        if name == "down":
            starts = [0, self.shapes["down"].channels]
            return h, *gated_product_compact(parts, starts, [None, None], thresholds[0], "silu", self.dtype)
        return rms_norm_compact(h, parts, None, self.norms[block][name], thresholds, 1e-5, "cast_first")

    def run(self, configs: Mapping[str, GemvConfig], sparsity: float) -> Tensor:
        """The parts of the last product for one token. Thresholds of a sparsity are found at the first run."""
        h, parts = self.hidden, self.zeros[: configs["down"].splits]
        for block, (name, shape) in itertools.product(range(len(self.weights)), self.shapes.items()):
            key = (sparsity, block, name)
            first = key not in self.thresholds
            if first:
                none = [torch.zeros(shape.channels, device=self.device) for _ in shape.sizes]
                sizes = self.listed(block, name, h, parts, none)[1].float().abs().flatten().sort().values
                dropped = round(sparsity * shape.channels)
                between = sizes[dropped - 1 : dropped + 1].mean()  # so that other rounding lists the same
                self.thresholds[key] = [each + between for each in none]
            h, *listed = self.listed(block, name, h, parts, self.thresholds[key])
            limits = [] if isinstance(shape.format, torch.dtype) else [self.thresholds[key]]
            case = (*listed, *self.weights[block][name], *limits)
            if first and not block:
                self.cases.setdefault(name, case)
            parts = product_of(shape)[0](*case, configs[name].splits, configs[name])
        return parts

    def times(self, several: Sequence[Mapping[str, GemvConfig]], sparsity: float, repetitions: int) -> list[float]:
        """Microseconds a block with each of several sets of configurations, which take turns."""
        calls = [partial(self.run, configs, sparsity) for configs in several]
        if self.device.type == "cuda":
            return microseconds([capture([call]) for call in calls], len(self.weights), repetitions)
        found = []
        for call in calls:  # on a CPU only to try things out
            start = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - start) / len(self.weights))
        return found

"""SwiGLU, GeGLU and the like, that list the channels they leave: `torch.ops.was.gated_product_compact`.

    x = act(gate) · up                              gate, up, x [K], K = intermediate size, one token
    index, count = compact(x, [t])                  see `compact`

gate and up come as the parts that `gather_gemv` left, and are added and rounded here.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_fx.kernels.ops import compact
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.triton_parts import begin, launch_options, list_kept, serves, sum_partials

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return x * tl.sigmoid(x)
    if ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == 2:  # 0.5 (1 + tanh(z)) = sigmoid(2z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == 3:
        return tl.where(x <= 0.0, 0.0, x)
    return tl.sigmoid(x)


@triton.jit
def _gated_product_compact(
    partial_ptr,  # [SPLITS, width] fp32
    gate_bias_ptr,  # [K]
    up_bias_ptr,  # [K]
    t_ptr,  # [K] fp32
    x_ptr,  # [K]
    index_ptr,  # [T, SEGMENT]
    count_ptr,  # [T]
    gate_start,
    up_start,
    width,
    K,
    T,
    SPLITS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SEGMENT: tl.constexpr,
    PDL: tl.constexpr,
):
    segments = tl.program_id(0) + tl.arange(0, 1)
    channels = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    inside = channels < K
    threshold = tl.load(t_ptr + channels, mask=inside, other=0.0)  # no kernel writes it
    begin(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = sum_partials(partial_ptr, gate_start + channels, inside, width, SPLITS)
    up = sum_partials(partial_ptr, up_start + channels, inside, width, SPLITS)
    if GATE_BIAS:
        gate += tl.load(gate_bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if UP_BIAS:
        up += tl.load(up_bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    gate = _activate(gate.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    x = (gate * up.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x_ptr + channels, x, mask=inside)
    keep = inside & ((tl.abs(x.to(tl.float32)) <= threshold) == 0)
    list_kept(keep, channels, segments, index_ptr, count_ptr, T, SEGMENT)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "sigmoid": torch.sigmoid,
}


def reference(
    partial: Tensor,
    starts: list[int],
    biases: list[Tensor | None],
    threshold: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's meaning in plain PyTorch.

    Args:
        partial: [S, 1, width] fp32, what `gather_gemv` gave for gate and up, among others.
        starts: the columns where gate and up begin.
        biases: of gate and up, [K] each or None.
        threshold: [K] fp32, of the Linear that reads x.
        activation: one of ACTIVATIONS.
        dtype: of the model.

    Returns:
        x [1, K] of `dtype`; index [1, T, SEGMENT] int32 and count [1, T] int32.
    """
    width = threshold.shape[0]
    total = partial.sum(0)
    gate, up = (
        (part if bias is None else part + bias.float()).to(dtype)
        for part, bias in zip((total[:, start : start + width] for start in starts), biases, strict=True)
    )
    x = _FUNCTIONS[activation](gate) * up
    return (x, *compact.reference(x, [threshold]))


def gated_product_compact(
    partial: Tensor,
    starts: list[int],
    biases: list[Tensor | None],
    threshold: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; by Triton where it serves."""
    if not serves(partial):
        return reference(partial, starts, biases, threshold, activation, dtype)
    channels = threshold.shape[0]
    x = partial.new_empty((1, channels), dtype=dtype)
    index, count = compact.empty_list(x, 1)
    _, segments, segment = index.shape
    _gated_product_compact[(segments,)](
        partial,
        *biases,
        threshold,
        x,
        index,
        count,
        *starts,
        partial.shape[-1],
        channels,
        segments,
        SPLITS=partial.shape[0],
        GATE_BIAS=biases[0] is not None,
        UP_BIAS=biases[1] is not None,
        ACTIVATION=ACTIVATIONS.index(activation),
        SEGMENT=segment,
        num_warps=16 if segment > 1024 else 8,
        **launch_options(partial),
    )
    return x, index, count


def fake(
    partial: Tensor,
    starts: list[int],
    biases: list[Tensor | None],
    threshold: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, uninitialised."""
    x = partial.new_empty((1, threshold.shape[0]), dtype=dtype)
    return (x, *compact.empty_list(x, 1))


gated_product_compact_op = register_op(
    "gated_product_compact(Tensor partial, int[] starts, Tensor?[] biases, Tensor threshold, str activation, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    gated_product_compact,
    fake,
)

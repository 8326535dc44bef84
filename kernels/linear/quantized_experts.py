"""The op that a product with chosen experts of quantised weights is: `torch.ops.was.quantized_experts`.

As `sparse_experts`, with the weights of E experts stacked: codes [E, K, …], scales [E, …] and, of int4, groups
[E, K, N / group, 2], each expert's as `QuantizedRows`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import quantized_linear
from was_fx.kernels.linear.sparse_experts import biases_of, check_pairs, products_by_expert
from was_fx.kernels.parts.private_names import calls_plainly
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import Choice, note_served
from was_fx.kernels.quantized.rows import expert_rows, outputs_of


def choose(
    x: Tensor, codes: Tensor, scales: Tensor, groups: Tensor | None, experts: Tensor, tokens: Tensor | None
) -> Choice:
    """What serves a call. Nothing is read but shapes, dtypes, strides and devices."""
    if x.is_cuda and tokens is None:
        from was_fx.kernels.linear import gpu_experts  # imports triton

        if gpu_experts.supports_quantized(x, codes, scales, groups, experts):
            return Choice("gpu_quantized_experts", "few tokens on a GPU, rows of codes", gpu_experts.quantized_experts)
    return Choice("by_expert", "each expert's rows are a product of their own", None)


def compute(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    """y [S, N] of x [R, K]; see `sparse_experts.reference` for the meaning, with dequantised weights."""
    shape = (codes.shape[0], outputs_of(codes, scales, groups))
    _check(x, codes, shape, bias, threshold, experts, tokens)
    if not len(experts):
        return x.new_empty(0, shape[1])
    choice = choose(x, codes, scales, groups, experts, tokens)
    if choice.function is not None:
        note_served((codes,), choice.name, choice.reason)
        # |x| is never below -1.
        limits = x.new_full((len(codes), x.shape[1]), -1, dtype=torch.float32) if threshold is None else threshold
        y: Tensor = choice.function(x, codes, scales, groups, bias, limits, experts)
        return y

    def product(rows: Tensor, chosen: Sequence[int], each: Tensor | None) -> Tensor:
        weights = [expert_rows(codes, scales, groups, e) for e in chosen]
        limits = [None if threshold is None else threshold[e] for e in chosen]
        return quantized_linear.compute(rows, weights, biases_of(bias, chosen), limits, each)

    return products_by_expert(product, x, shape, experts, tokens)


def _check(
    x: Tensor,
    codes: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> None:
    """Refuse arguments that don't fit each other.

    Raises:
        ValueError: says what was found and what was expected.
    """
    if codes.dim() != 3 or x.dim() != 2 or x.shape[1] != codes.shape[1] or x.device != codes.device:
        raise ValueError(
            f"quantized_experts: x is {list(x.shape)} on {x.device} and the codes {list(codes.shape)} on "
            f"{codes.device}; expected x [R, K], codes [E, K, …] and one device"
        )
    check_pairs("quantized_experts", x, shape, bias, threshold, experts, tokens)


def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    shape = (codes.shape[0], outputs_of(codes, scales, groups))
    _check(x, codes, shape, bias, threshold, experts, tokens)
    return x.new_empty(experts.shape[0], shape[1])


quantized_experts = register_op(
    "quantized_experts(Tensor x, Tensor codes, Tensor scales, Tensor? groups, Tensor? bias, Tensor? threshold, "
    "Tensor experts, Tensor? tokens) -> Tensor",
    compute,
    _fake,
)


def call(x: Tensor, codes: Tensor, *arguments: Any) -> Tensor:
    """`was::quantized_experts`; on a CPU past the dispatcher where nothing needs it."""
    if not torch.compiler.is_compiling() and x.is_cpu and calls_plainly(x):
        return compute(x, codes, *arguments)
    found: Tensor = quantized_experts(x, codes, *arguments)
    return found

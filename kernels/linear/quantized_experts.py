"""The op that a product with chosen experts of quantised weights is: `torch.ops.was.quantized_experts`.

As `sparse_experts`, with the weights of E experts stacked: codes [E, K, …], scales [E, …] and, of int4, groups
[E, K, N / group, 2], each expert's as `QuantizedRows`.
"""

from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import quantized_linear
from was_fx.kernels.linear.sparse_experts import check_pairs, products_by_expert
from was_fx.kernels.parts.private_names import calls_plainly
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import note_served
from was_fx.kernels.quantized.rows import QuantizedRows


def expert_rows(codes: Tensor, scales: Tensor, groups: Tensor | None, expert: int) -> QuantizedRows:
    """The weight [N, K] of one expert: views."""
    return QuantizedRows(codes[expert], scales[expert], None if groups is None else groups[expert])


def outputs_of(codes: Tensor, scales: Tensor, groups: Tensor | None) -> int:
    """N."""
    return scales.shape[1] if groups is None else 2 * codes.shape[2]


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
    if x.is_cuda and tokens is None:
        from was_fx.kernels.linear import gpu_experts  # imports triton

        if gpu_experts.supports_quantized(x, codes, scales, groups, experts):
            note_served((codes,), "gpu_quantized_experts", "few tokens on a GPU, rows of codes")
            # |x| is never below -1.
            limits = x.new_full((len(codes), x.shape[1]), -1, dtype=torch.float32) if threshold is None else threshold
            return gpu_experts.quantized_experts(x, codes, scales, groups, bias, limits, experts)
    chosen = experts.tolist()
    if len(x) == 1 and tokens is None and all(0 <= e < shape[0] for e in chosen):
        rows = [expert_rows(codes, scales, groups, e) for e in chosen]
        biases = [None if bias is None else bias[e] for e in chosen]
        each = [None if threshold is None else threshold[e] for e in chosen]
        return quantized_linear.compute(x, rows, biases, each).view(len(chosen), -1)

    def product(rows: Tensor, e: int, each: Tensor | None) -> Tensor:
        weight = expert_rows(codes, scales, groups, e)
        own, limit = None if bias is None else bias[e], None if threshold is None else threshold[e]
        return quantized_linear.compute(rows, (weight,), (own,), (limit,), each)

    return products_by_expert(product, x, shape, experts, chosen, tokens)


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

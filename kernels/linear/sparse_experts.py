"""The op that a product with chosen experts is: `torch.ops.was.sparse_experts`.

    e = experts[s]        y[s] = (x[s // c] ⊙ [not |x[s // c]| ≤ t[e]]) W[e]ᵀ + b[e]

    x [R, K], experts [S] integers, S = R · c; W [E, N, K], b [E, N], t [E, K] fp32 -> y [S, N]

Every pair of a token and one of its experts is a row of y. An expert outside 0 … E - 1 is another rank's: its rows are
zero. Without t every channel is kept. `tokens`, bool [R], says which rows drop channels; None: all.

`reference` is the meaning and runs anywhere. On a CPU each expert's rows are one sparse (or dense) product by what
serves those of Linears; on a GPU one launch reads the kept rows of all pairs, and many pairs are sorted by expert for
torch's grouped product. Nothing there waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.linear import dense_linear, sparse_linear
from was_fx.kernels.parts.private_names import calls_plainly, is_transforming
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import Choice, note_served


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None = None,
) -> Tensor:
    """The op's meaning in plain PyTorch; any device, floating dtype and strides.

    Args:
        x: [R, K].
        weight: [E, N, K] of x's dtype.
        bias: [E, N] or None.
        threshold: [E, K] fp32; None keeps every channel.
        experts: [R · c] integers: the experts of row 0, then those of row 1, …
        tokens: bool [R], the rows that drop channels; None for all.

    Returns:
        [R · c, N], x's dtype.
    """
    known = (experts >= 0) & (experts < weight.shape[0])
    chosen = torch.where(known, experts, 0)
    rows = x.repeat_interleave(len(experts) // len(x), dim=0)
    if threshold is not None:
        each = None if tokens is None else tokens.repeat_interleave(len(experts) // len(x))
        rows = rows.masked_fill(sparse_linear.dropped_channels(rows, threshold[chosen], each), 0)
    y = torch.stack([row @ weight[e].t() for row, e in zip(rows, chosen.tolist(), strict=True)])
    if bias is not None:
        y = y + bias[chosen]
    return y * known[:, None]


def choose(x: Tensor, weight: Tensor, threshold: Tensor | None, experts: Tensor, tokens: Tensor | None) -> Choice:
    """What serves a call. Nothing is read but shapes, dtypes, strides and devices."""
    if x.is_cuda:
        from was_fx.kernels.linear import gpu_experts  # imports triton

        if tokens is None and threshold is not None and gpu_experts.supports(x, weight, experts):
            return Choice("gpu_experts", "few tokens on a GPU, rows of Wᵀ contiguous", gpu_experts.sparse_experts)
        return Choice("grouped_product", f"{len(experts)} rows of {x.dtype}, sorted by expert", by_groups)
    return Choice("by_expert", "each expert's rows are a product of their own", by_expert)


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None = None,
) -> Tensor:
    """See `reference`; by what `choose` chooses."""
    check_arguments(x, weight, bias, threshold, experts, tokens)
    if not len(experts):
        return x.new_empty(0, weight.shape[1])
    choice = choose(x, weight, threshold, experts, tokens)
    assert choice.function is not None
    if choice.name != "by_expert":  # whose products note themselves
        note_served((weight,), choice.name, choice.reason)
    y: Tensor = choice.function(x, weight, bias, threshold, experts, tokens)
    return y


# y [P, ΣN] of rows [P, K] that share some experts, and of their tokens.
Product = Callable[[Tensor, Sequence[int], Tensor | None], Tensor]


def by_expert(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    """One product for each expert that is called; waits for a device that is no CPU."""

    def product(rows: Tensor, chosen: Sequence[int], each: Tensor | None) -> Tensor:
        weights, biases = [weight[e] for e in chosen], biases_of(bias, chosen)
        if threshold is not None:
            return sparse_linear.compute(rows, weights, biases, [threshold[e] for e in chosen], each)
        parts = [dense_linear.compute(rows, w, b) for w, b in zip(weights, biases, strict=True)]
        return torch.cat(parts, dim=-1)

    return products_by_expert(product, x, weight.shape[:2], experts, tokens)


def biases_of(bias: Tensor | None, chosen: Sequence[int]) -> list[Tensor | None]:
    """The biases [N] of some experts, of those [E, N] of all."""
    return [None if bias is None else bias[e] for e in chosen]


def products_by_expert(
    product: Product, x: Tensor, shape: tuple[int, ...], experts: Tensor, tokens: Tensor | None
) -> Tensor:
    """The products of each expert's rows of x, put where they belong.

    Args:
        product: of rows and the experts that they share.
        x: [R, K].
        shape: (E, N).
        experts: [R · c].
        tokens: bool [R] or None.
    """
    count, outputs = shape
    chosen = experts.tolist()
    if len(x) == 1 and tokens is None and all(0 <= e < count for e in chosen):
        # One token: its experts share an input, as siblings do.
        return product(x, chosen, None).view(len(chosen), outputs)
    y = x.new_zeros(len(chosen), outputs)
    rows = torch.arange(len(chosen), device=x.device).div(len(chosen) // len(x), rounding_mode="floor")
    for e in sorted({e for e in chosen if 0 <= e < count}):
        pairs = (experts == e).nonzero()[:, 0]
        own = rows[pairs]
        y[pairs] = product(x[own], [e], None if tokens is None else tokens[own])
    return y


def by_groups(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    """Pairs sorted by expert, for torch's grouped product where it serves; else one product for each expert."""
    if x.dtype != torch.bfloat16 or x.shape[1] % 8 or weight.shape[1] % 8:  # it wants rows of whole 16 bytes
        return by_expert(x, weight, bias, threshold, experts, tokens)
    count = weight.shape[0]
    known = (experts >= 0) & (experts < count)
    sorted_experts, order = torch.where(known, experts, count).sort(stable=True)
    own = order.div(len(experts) // len(x), rounding_mode="floor")
    rows, each = x[own], sorted_experts.clamp(max=count - 1)
    if threshold is not None:
        dropped = sparse_linear.dropped_channels(rows, threshold[each], None if tokens is None else tokens[own])
        rows = rows.masked_fill(dropped, 0)
    bounds = torch.arange(count, device=x.device, dtype=sorted_experts.dtype)
    ends = torch.searchsorted(sorted_experts, bounds, right=True).to(torch.int32)
    products = torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    if bias is not None:
        products = products + bias[each]
    # Rows of other ranks' experts lie behind the last end, where nothing was written.
    products = products.masked_fill((sorted_experts == count)[:, None], 0)
    return torch.empty_like(products).index_copy_(0, order, products)


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> None:
    """Refuse arguments that don't fit each other.

    Raises:
        ValueError: says what was found and what was expected.
    """
    if weight.dim() != 3 or x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"sparse_experts: x is {list(x.shape)} and the weight {list(weight.shape)}; expected x [R, K], weight "
            "[E, N, K]"
        )
    check_pairs("sparse_experts", x, (weight.shape[0], weight.shape[1]), bias, threshold, experts, tokens)
    if weight.dtype != x.dtype:
        raise ValueError(f"sparse_experts: x is {x.dtype} and the weight {weight.dtype}; expected one dtype")
    if x.device != weight.device:
        raise ValueError(
            f"sparse_experts: x is on {x.device} and the weight on {weight.device}; expected one device: move the "
            "whole model by model.to(device)"
        )


def check_pairs(
    op: str,
    x: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> None:
    """Refuse what doesn't fit x [R, K] and E experts of N outputs, shape (E, N).

    Raises:
        ValueError: says what was found and what was expected.
    """
    count, outputs = shape
    rows, channels = x.shape
    if experts.dim() != 1 or experts.dtype not in (torch.int64, torch.int32) or experts.shape[0] % max(rows, 1):
        raise ValueError(
            f"{op}: experts is {experts.dtype} {list(experts.shape)}; expected integers, as many for each of the "
            f"{rows} rows of x"
        )
    if threshold is not None and (threshold.shape != (count, channels) or threshold.dtype != torch.float32):
        raise ValueError(
            f"{op}: the threshold is {threshold.dtype} {list(threshold.shape)}; expected fp32 {[count, channels]}"
        )
    if bias is not None and (bias.shape != (count, outputs) or bias.dtype != x.dtype):
        raise ValueError(f"{op}: the bias is {bias.dtype} {list(bias.shape)}; expected {x.dtype} {[count, outputs]}")
    if tokens is not None and (tokens.dtype != torch.bool or tokens.shape != (rows,)):
        raise ValueError(f"{op}: tokens is {tokens.dtype} {list(tokens.shape)}; expected bool [{rows}]")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    check_arguments(x, weight, bias, threshold, experts, tokens)
    return x.new_empty(experts.shape[0], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, threshold, experts, tokens = inputs
    ctx.save_for_backward(x, weight, threshold, experts, tokens)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Of x [R, K] and W [E, N, K] (empty unless asked for), from that of y [S, N]; the choice of channels and experts
    counts as a constant."""
    per = len(experts) // len(x)
    rows = x.repeat_interleave(per, dim=0)
    dropped = None
    if threshold is not None:
        chosen = experts.clamp(0, weight.shape[0] - 1)
        each = None if tokens is None else tokens.repeat_interleave(per)
        dropped = sparse_linear.dropped_channels(rows, threshold[chosen], each)
        rows = rows.masked_fill(dropped, 0)
    grad_rows = torch.zeros_like(rows)
    grad_weight = weight.new_zeros(weight.shape if of_weight else 0)
    for e in sorted({e for e in experts.tolist() if 0 <= e < weight.shape[0]}):
        pairs = (experts == e).nonzero()[:, 0]
        grad_rows[pairs] = grad[pairs] @ weight[e]
        if of_weight:
            grad_weight[e] = grad[pairs].t() @ rows[pairs]
    grad_rows = grad_rows if dropped is None else grad_rows.masked_fill(dropped, 0)
    return grad_rows.view(len(x), per, -1).sum(1), grad_weight


def _gradients_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    experts: Tensor,
    tokens: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if of_weight else 0)


_gradients_op = register_op(
    "sparse_experts_backward(Tensor grad, Tensor x, Tensor weight, Tensor? threshold, Tensor experts, Tensor? tokens, "
    "bool of_weight) -> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, threshold, experts, tokens = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = _gradients_op(grad, x, weight, threshold, experts, tokens, needs_weight)
    grad_bias = None
    if needs_bias:
        count = weight.shape[0]
        known = (experts >= 0) & (experts < count)
        zeros = grad.new_zeros(weight.shape[:2])
        grad_bias = zeros.index_add(0, experts.clamp(0, count - 1), grad * known[:, None])
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None, None, None


sparse_experts = register_op(
    "sparse_experts(Tensor x, Tensor weight, Tensor? bias, Tensor? threshold, Tensor experts, Tensor? tokens) "
    "-> Tensor",
    compute,
    _fake,
)
torch.library.register_autograd(sparse_experts, _backward, setup_context=_save_for_backward)


def call(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None, experts: Tensor, tokens: Tensor | None
) -> Tensor:
    """`was::sparse_experts`; on a CPU past the dispatcher where nothing needs it. By its meaning under a transform of
    torch.func, which can't see into an op with a backward of its own."""
    if not torch.compiler.is_compiling():
        if x.is_cpu and calls_plainly(x, weight):
            return compute(x, weight, bias, threshold, experts, tokens)
        if is_transforming():
            return reference(x, weight, bias, threshold, experts, tokens)
    return sparse_experts(x, weight, bias, threshold, experts, tokens)

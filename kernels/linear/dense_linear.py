"""The op that a dense product over any layout is: `torch.ops.was.dense_linear`.

    y = x Wᵀ + b            x [..., K], W [N, K], b [N] -> y [..., N]

`torch.nn.functional.linear` is the meaning. On a CPU its product with an input-major weight in bf16 or fp16 can take
fifty times as long as that with a row-major one, and its product of one token reads slower than memory can; `choose`
says what serves instead.
"""

from typing import Any

import torch
from torch import Tensor

from was_fx.kernels.cpu.library import DTYPES, KINDS, kind, library
from was_fx.kernels.linear import cpu_gather, cpu_product
from was_fx.kernels.parts.private_names import calls_plainly, is_transforming, multiplies_natively
from was_fx.kernels.parts.registration import register_op
from was_fx.kernels.parts.served import Choice

# Where torch's product takes over, by `benchmarks/cpu_kernels.py`. Most tokens that read the rows of a row-major weight
# faster here; most tokens of bf16 or fp16 that gather all rows of Wᵀ faster than the product of many tokens.
MAX_TOKENS_BY_ROWS = 4
MAX_TOKENS_GATHERED = 4
# Where torch multiplies pairs of bf16 too: most tokens that are faster here, and from how many elements of a weight all
# are, unless both do it by AMX.
MAX_TOKENS_BY_PAIRS = 64
MANY_ELEMENTS = 1 << 20


def choose(x: Tensor, weight: Tensor) -> Choice:
    """What serves x [..., K] and weight [N, K]. Nothing is read but shapes, dtypes, strides and devices."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype not in DTYPES or x.dtype != weight.dtype:
        return Choice("torch", f"{x.dtype} on {x.device.type}", None)
    if not x.numel() or not weight.numel():
        return Choice("torch", "an empty product", None)
    tokens, by_columns = x.numel() // x.shape[-1], weight.t().is_contiguous()
    native = multiplies_natively(x.dtype)
    if library() is None:
        if native or not by_columns:
            return Choice("torch", "no C++ compiler was found", None)
        return Choice(
            "cpu_upcast", f"no C++ compiler was found, and torch has no fast {x.dtype} here", cpu_product.upcast
        )
    few = MAX_TOKENS_GATHERED if x.dtype != torch.float32 else cpu_gather.max_tokens(x.dtype)
    if by_columns and tokens <= few:
        return Choice("cpu_gather", "few tokens, rows of Wᵀ contiguous", _gather_all)
    if not by_columns:
        if weight.is_contiguous() and tokens <= MAX_TOKENS_BY_ROWS:
            return Choice("cpu_rows", "few tokens, rows of W contiguous", cpu_product.by_rows)
        return Choice("torch", f"{tokens} tokens, rows of Wᵀ not contiguous", None)
    if native and (x.dtype != torch.bfloat16 or _torch_has_pairs(tokens, weight)):
        return Choice("torch", f"{tokens} tokens of {x.dtype}, which torch multiplies as fast", None)
    return Choice("cpu_product", f"{tokens} tokens of {x.dtype}, rows of Wᵀ contiguous", cpu_product.by_columns)


def _torch_has_pairs(tokens: int, weight: Tensor) -> bool:
    name = KINDS[kind()]
    return tokens > MAX_TOKENS_BY_PAIRS and (name == "amx" or (name == "avx512bf16" and weight.numel() < MANY_ELEMENTS))


def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N]; by what `choose` chooses."""
    function = choose(x, weight).function or torch.nn.functional.linear
    return function(x, weight, bias)


def _gather_all(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu_gather.sparse_linear(x, (weight,), (bias,), None)


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = compute(x, weight, bias)
    return y if y.is_contiguous() else y.contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return (
        grad @ weight if ctx.needs_input_grad[0] else None,
        grad_weight,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


dense_linear = register_op("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _dense_linear, _fake)
torch.library.register_autograd(dense_linear, _backward, setup_context=_save_for_backward)


def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`was::dense_linear`; past the dispatcher where nothing needs it. By its meaning under a transform of torch.func,
    which can't see into an op with a backward of its own."""
    if not torch.compiler.is_compiling():
        if calls_plainly(x, weight):
            return compute(x, weight, bias)
        if is_transforming():
            return torch.nn.functional.linear(x, weight, bias)
    return dense_linear(x, weight, bias)

"""Private names of torch that kernels need, each with what it is for. `tests/was_fx/compat` fails when one is gone."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["DispatchMode", "tree_leaves", "tree_map", "tree_map_only"]

# A value of a tensor is read into Python; softmax; attention as torch computes it on a CPU.
READ_VALUE = torch.ops.aten._local_scalar_dense.default
SOFTMAX = torch.ops.aten._softmax.default
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def operator_name(operator: Any) -> str:
    """The name alone: "add_" of `torch.ops.aten.add_.Tensor`."""
    return str(operator._schema.name.partition("::")[2])


def operator_arguments(operator: Any) -> Iterable[Any]:
    """Of an operator: each has a `name` and, where memory is shared or written, an `alias_info`."""
    arguments: Iterable[Any] = operator._schema.arguments
    return arguments


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, by the counter that autograd keeps. One of inference mode has none."""
    return tensor._version


def storage_id(storage: torch.UntypedStorage) -> int:
    """What tells a storage from others that are alive."""
    return storage._cdata


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions by which torch multiplies matrices of a dtype, in any layout."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype in (torch.float32, torch.float64)


def is_transforming() -> bool:
    """Whether a transform of torch.func is in force: grad, vmap, …"""
    return torch._C._functorch.peek_interpreter_stack() is not None


def calls_plainly(*tensors: Tensor) -> bool:
    """Whether a call with these tensors needs no dispatcher: no gradients, subclass, mode, transform or tracer."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in _PLAIN or (grad and tensor.requires_grad):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not is_transforming()
        and torch._C._get_tracing_state() is None
    )


_PLAIN = (Tensor, torch.nn.Parameter)

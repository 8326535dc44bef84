"""How an op of `torch.ops.was` is registered."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from was_fx.kernels.parts.devices import on

_library = torch.library.Library("was", "FRAGMENT")


def register_op(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *, any_strides: bool = False
) -> Any:
    """The op of a schema, `name(arguments) -> results`.

    Args:
        schema: its name is the op's.
        implementation: computes it, on every device; its first argument is a tensor or a list of some. That one's GPU
            is torch's current one meanwhile.
        fake: what it returns, of the right shape and dtype; gives compilers the meaning.
        any_strides: whether it takes tensors as they lie. Of one that Inductor has not stored yet, it makes a copy for
            each call of an op that doesn't.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.flexible_layout,) if any_strides else ()))
    _library.define(schema, tags=tags)
    _library.impl(name, _on_its_device(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"was::{name}", fake, lib=_library)
    return getattr(torch.ops.was, name).default


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def on_its_device(*arguments: Any, **keywords: Any) -> Any:
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        if not first.is_cuda:
            return implementation(*arguments, **keywords)
        with on(first.device):
            return implementation(*arguments, **keywords)

    return on_its_device

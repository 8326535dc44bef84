"""How an op of `torch.ops.was` is registered."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("was", "FRAGMENT")


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The op of a schema, `name(arguments) -> results`.

    Args:
        schema: its name is the op's.
        implementation: computes it, on every device.
        fake: what it returns, of the right shape and dtype; gives compilers the meaning.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"was::{name}", fake, lib=_library)
    return getattr(torch.ops.was, name).default

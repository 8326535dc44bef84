"""Make Linears sparse in place, their weights laid out as the kernels want them, and give these their strides back."""

import functools
from collections.abc import Mapping

from torch import nn

from was_fx.kernels.linear.layout import restore
from was_fx.modules.linears import LinearModule
from was_fx.modules.placement import make_input_major, rearrange
from was_fx.modules.sparse_linear import make_dense, make_sparse
from was_fx.modules.token_rule import TokenRule
from was_fx.modules.weights import is_offloaded, local
from was_fx.schedules.files.schedule import Schedule

Strides = dict[str, tuple[int, ...]]


def make_all_sparse(linears: Mapping[str, LinearModule], schedule: Schedule, rule: TokenRule) -> Strides:
    """Make Linears sparse and move their weights into input-major storage; undone as a whole if any fails.

    Returns:
        By qualified name, the strides that each weight (this rank's part of it) had; those that share it are left out.
    """
    strides: Strides = {}
    seen: set[int] = set()
    done: list[nn.Module] = []
    try:
        for name, linear in linears.items():
            parameter = linear.parameter
            first = id(parameter) not in seen  # two Linears may share one, and experts do
            if linear.rows is None and first:
                seen.add(id(parameter))
                strides[name] = local(parameter).stride()
            make_sparse(linear, schedule.linears[name], schedule.norm, rule)
            if first or linear.expert is None:
                done.append(linear.module)
            make_input_major(linear)
    except BaseException:
        for module in dict.fromkeys(done):
            make_dense(module)
        for name, stride in strides.items():
            give_back_strides(linears[name], stride)
        raise
    return strides


def give_back_strides(linear: LinearModule, stride: tuple[int, ...]) -> None:
    """Give a weight the strides it had, in a storage of its own."""
    if is_offloaded(linear.parameter):
        return
    part = local(linear.parameter)
    alone = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    if part.stride() != stride or not alone:
        rearrange(linear.parameter, functools.partial(restore, stride=stride))

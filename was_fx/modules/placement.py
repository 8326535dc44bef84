"""Where a model's weights are: here, offloaded to CPU memory or disk, on several devices, sharded over ranks.

`device_map=` wraps modules in hooks of accelerate; offloaded weights exist only while such a hook runs. `tp_plan=`
makes DTensors of weights, of which each rank holds a part.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from was_fx.compat.tensors import take_strides
from was_fx.kernels.linear.layout import to_input_major
from was_fx.modules.linears import LinearModule
from was_fx.modules.weights import is_offloaded, is_sharded, local
from was_fx.schedules.score import channel_norms


def input_device(model: nn.Module) -> torch.device:
    """Where the tokens of a call belong: with the first weight that is not offloaded."""
    devices = (parameter.device for parameter in model.parameters() if not is_offloaded(parameter))
    return next(devices, torch.device("cpu"))


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose ranks see only some input channels of some Linears.

    Raises:
        ValueError: with what to do.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded over ranks (tp_plan=), where no rank sees every channel; calibrate it without "
            "tp_plan, on one device or with device_map='auto', and use the schedule here"
        )


@contextlib.contextmanager
def loaded(linear: LinearModule) -> Iterator[Tensor]:
    """W [N, K] of a Linear with its values, wherever they are kept; this rank's part is all that a DTensor has."""
    if not is_offloaded(linear.parameter):
        yield linear.weight
        return
    if not hasattr(linear.module, "_hf_hook"):
        raise ValueError(f"{linear.name}: its weight is on the meta device and nothing loads it; load the model first")
    from accelerate.utils import align_module_device

    with align_module_device(linear.module):
        yield linear.weight


@torch.no_grad()
def whole_channel_norms(linear: LinearModule, norm: int) -> Tensor:
    """Channel norms of the whole weight, wherever its parts are.

    Args:
        linear: K input channels.
        norm: p, 1 or 2.

    Returns:
        [K] fp32, on the device of the weight (of its execution, if it is offloaded). Ranks add up what each has, so
        all of them must call this.
    """
    with loaded(linear) as weight:
        if not is_sharded(weight):
            return channel_norms(weight, norm)
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        kinds = {None: Replicate(), 0: Partial(), 1: Shard(0)}
        placements = [kinds[_dim(placement, weight)] for placement in weight.placements]  # type: ignore[attr-defined]
        powers = channel_norms(local(weight), norm).pow(norm)
        mesh, size = weight.device_mesh, (weight.shape[1],)  # type: ignore[attr-defined]
        summed = DTensor.from_local(powers, mesh, placements, run_check=False, shape=torch.Size(size), stride=(1,))
        return summed.full_tensor().pow(1 / norm)


@torch.no_grad()
def own_channels(values: Tensor, linear: LinearModule) -> Tensor:
    """The part of `values` [K] for the input channels that this rank holds; all of them unless those are sharded."""
    if not is_sharded(linear.parameter):
        return values
    weight = linear.weight
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(0) if _dim(each, weight) == 1 else Replicate() for each in weight.placements]  # type: ignore[attr-defined]
    return distribute_tensor(values, weight.device_mesh, placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]


def make_input_major(linear: LinearModule) -> None:
    """Move a weight that is here into the storage of a sparse product, where that is another than it has."""
    weight = linear.parameter
    if linear.rows is None and not linear.input_major and not is_offloaded(weight):
        rearrange(weight, to_input_major)


@torch.no_grad()
def rearrange(weight: Tensor, change: Callable[[Tensor], None]) -> None:
    """Apply `change`, which moves a matrix in place into other strides, to a weight or to this rank's part of it."""
    part = local(weight)
    change(part)
    if part is weight:
        return
    from torch.distributed.tensor import DTensor

    # A DTensor has strides of its own, and Dynamo wants them to agree with those of its part.
    shape = weight.shape
    stride = (1, shape[0]) if part.t().is_contiguous() and not part.is_contiguous() else (shape[1], 1)
    again = DTensor.from_local(
        part,
        weight.device_mesh,  # type: ignore[attr-defined]
        weight.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=shape,
        stride=stride,
    )
    take_strides(weight, again)


def sum_over_ranks(values: Tensor, linear: LinearModule) -> Tensor:
    """Sum of a tensor over the ranks that share a Linear; the tensor itself if it is on one."""
    if not is_sharded(linear.parameter):
        return values
    weight = linear.weight
    from torch.distributed.tensor import DTensor, Partial

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(values, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()


def _dim(placement: Any, weight: Tensor) -> int | None:
    """The dimension of W [N, K] that a placement shards."""
    dim = getattr(placement, "dim", None)
    return None if dim is None else dim % weight.dim()

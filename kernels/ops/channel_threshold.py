"""Channel thresholds of a dense model's weight: `torch.ops.was.channel_threshold`.

    t[k] = τ / ‖W[:, k]‖ₚ^α            W [N, K] -> t [K] fp32; +inf where the norm is 0 and α > 0

A graph that was compiled with a schedule holds this op, not its result, because Dynamo lets models of one shape share
a graph. It is computed once for each weight and version of it, and copied afterwards.
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Results kept: more than any model has Linears, twice.
_KEPT = 4096
_known: OrderedDict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = OrderedDict()


def reference(weight: Tensor, threshold: float, exponent: float, norm: int) -> Tensor:
    """The op's meaning.

    Args:
        weight: [N, K], any floating dtype and strides.
        threshold: τ, finite and at least 0.
        exponent: α, finite and at least 0.
        norm: p, 1 or 2.

    Returns:
        [K] fp32 on the weight's device.
    """
    scale = torch.linalg.vector_norm(weight.detach(), norm, dim=0, dtype=torch.float32).pow(exponent)
    return torch.where(scale > 0, threshold / scale, math.inf)


def channel_threshold(weight: Tensor, threshold: float, exponent: float, norm: int) -> Tensor:
    """See `reference`."""
    storage = weight.untyped_storage()
    key = (
        storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, weight._version,
        threshold, exponent, norm,
    )  # fmt: skip
    found = _known.get(key)
    if found is None or found[0].expired():
        if len(_known) >= _KEPT:
            _known.popitem(last=False)
        found = _known[key] = StorageWeakRef(storage), reference(weight, threshold, exponent, norm)
    return found[1].clone()


_library = torch.library.Library("was", "FRAGMENT")
_library.define(
    "channel_threshold(Tensor weight, float threshold, float exponent, int norm) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("channel_threshold", channel_threshold, "CompositeExplicitAutograd")
torch.library.register_fake(
    "was::channel_threshold",
    lambda weight, threshold, exponent, norm: weight.new_empty(weight.shape[1], dtype=torch.float32),
    lib=_library,
)

channel_threshold_op = torch.ops.was.channel_threshold.default

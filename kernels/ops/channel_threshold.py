"""Channel thresholds of a dense model's weight: `torch.ops.was.channel_threshold`.

    t[k] = τ / ‖W[:, k]‖ₚ^α            W [N, K] -> t [K] fp32; +inf where the norm is 0 and α > 0

A graph that was compiled with a schedule holds this op, not its result, because Dynamo lets models of one shape share
a graph. It is computed once for each weight and version of it, and copied afterwards.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from was_fx.kernels.parts.private_names import storage_id, version
from was_fx.kernels.parts.registration import register_op

# Past so many results, those of weights that are gone are dropped: more than any model has Linears, twice.
_MANY = 4096
# By weight and numbers: the weight's storage, its version, and the result. Results of living weights stay where they
# are, because a captured CUDA graph reads them there.
_known: dict[tuple[Any, ...], tuple[StorageWeakRef, int, Tensor]] = {}


def reference(weight: Tensor, threshold: float, exponent: float, norm: int, input_major: bool = False) -> Tensor:
    """The op's meaning.

    Args:
        weight: [N, K], or [K, N] when `input_major`; any floating dtype and strides.
        threshold: τ, finite and at least 0.
        exponent: α, finite and at least 0.
        norm: p, 1 or 2.
        input_major: see `weight`. It has to come as its module holds it: a view that a compiler makes of it has a
            version of its own.

    Returns:
        [K] fp32 on the weight's device.
    """
    outputs, sums = 1 if input_major else 0, torch.promote_types(weight.dtype, torch.float32)
    scale = torch.linalg.vector_norm(weight.detach(), norm, dim=outputs, dtype=sums).float().pow(exponent)
    return torch.where(scale > 0, threshold / scale, math.inf)


def channel_threshold(weight: Tensor, threshold: float, exponent: float, norm: int, input_major: bool) -> Tensor:
    """See `reference`."""
    if weight.is_inference():  # it has no version
        return reference(weight, threshold, exponent, norm, input_major)
    storage = weight.untyped_storage()
    key = (
        storage_id(storage), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype,
        threshold, exponent, norm, input_major,
    )  # fmt: skip
    found = _known.get(key)
    if found is None or found[0].expired() or found[1] != version(weight):
        if len(_known) >= _MANY:
            for each in [each for each, (home, *_) in _known.items() if home.expired()]:
                del _known[each]
        result = reference(weight, threshold, exponent, norm, input_major)
        found = _known[key] = StorageWeakRef(storage), version(weight), result
    return found[2].clone()


def _fake(weight: Tensor, threshold: float, exponent: float, norm: int, input_major: bool) -> Tensor:
    return weight.new_empty(weight.shape[0 if input_major else 1], dtype=torch.float32)


def _no_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


channel_threshold_op = register_op(
    "channel_threshold(Tensor weight, float threshold, float exponent, int norm, bool input_major) -> Tensor",
    channel_threshold,
    _fake,
)
torch.library.register_autograd(channel_threshold_op, lambda ctx, grad: (None,) * 5, setup_context=_no_gradients)

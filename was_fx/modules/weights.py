"""What a weight is: plain, a rank's part of one, or not loaded yet."""

from torch import Tensor

from was_fx.compat.tensors import part_of


def is_sharded(weight: object) -> bool:
    """Whether a weight is a DTensor, which holds this rank's part only."""
    return hasattr(weight, "placements") and hasattr(weight, "to_local")


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that tensor parallelism made a DTensor; any other weight itself."""
    return part_of(weight)


def is_offloaded(weight: Tensor) -> bool:
    """Whether a weight has no values until accelerate's hook loads it."""
    return weight.is_meta

"""What a weight is: plain, a rank's part of one, or not loaded yet."""

from torch import Tensor, nn

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


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that a state dict of the model holds; what two modules share counts once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

"""The blocks of a model: the groups of Linears that a level is searched for."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from was_fx.schedules.names import split_name
from was_fx.schedules.projection import Vector


@dataclass(frozen=True)
class Block:
    """Linears that share a level.

    Attributes:
        name: dotted path up to the block's index, `model.layers.3`; a Linear outside the blocks is its own block.
        shapes: (N, K) of its Linears by qualified name, in the model's order.
    """

    name: str
    shapes: Mapping[str, tuple[int, int]]

    @property
    def weights(self) -> dict[str, int]:
        """N·K of each Linear."""
        return {name: rows * columns for name, (rows, columns) in self.shapes.items()}

    @property
    def size(self) -> int:
        """Number of scheduled weights."""
        return sum(self.weights.values())


def find_blocks(shapes: Mapping[str, tuple[int, int]]) -> list[Block]:
    """Group Linears by block, in the order in which the blocks come.

    Args:
        shapes: (N, K) by qualified name.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        index, projection = split_name(name)
        path = name if index is None else name.removesuffix(f".{projection}")
        groups.setdefault(path, {})[name] = shape
    return [Block(path, group) for path, group in groups.items()]


def block_levels(blocks: list[Block], sparsities: Mapping[str, float]) -> Vector:
    """Mean sparsity of each block, weighted by N·K.

    Args:
        blocks: D of them.
        sparsities: from 0 to 1, of every Linear of the blocks by qualified name.

    Returns:
        [D], float64.
    """
    return np.array(
        [
            np.average([sparsities[name] for name in block.shapes], weights=list(block.weights.values()))
            for block in blocks
        ]
    )

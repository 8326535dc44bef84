"""Names of matrices that a model holds together in one parameter, one for each expert, and how often they are read.

`….experts.gate_up_proj[3]` is the matrix of expert 3 in the parameter `….experts.gate_up_proj`. Those of one parameter
are a group: a search gives them one sparsity, each with a threshold of its own, and tables show them in one line.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

# What an expert that has seen fewer tokens is measured to be says more about these tokens than about it.
FEW_TOKENS = 32

Value = TypeVar("Value")

_MEMBER = re.compile(r"(.+)\[(\d+)\]")


def member(group: str, expert: int) -> str:
    """The qualified name of an expert's matrix in a group."""
    return f"{group}[{expert}]"


def group_of(name: str) -> str:
    """The group of an expert's matrix; any other name is its own."""
    found = _MEMBER.fullmatch(name)
    return found[1] if found else name


def is_member(name: str) -> bool:
    """Whether a name is an expert's matrix."""
    return _MEMBER.fullmatch(name) is not None


def module_of(name: str) -> str:
    """The qualified name of the module that holds a Linear, or an expert's matrix."""
    return group_of(name).rpartition(".")[0] if is_member(name) else name


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by group, in their order; a Linear alone is a group of one."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(group_of(name), []).append(name)
    return found


def group_shapes(
    shapes: Mapping[str, tuple[int, int]], experts_per_token: Mapping[str, float]
) -> dict[str, tuple[int, int]]:
    """(N, K) by group, for a search that gives all experts of a group one sparsity: N counts the outputs of as many
    experts as a token is sent to."""
    found = {}
    for group, names in groups(shapes).items():
        outputs, inputs = shapes[names[0]]
        found[group] = max(1, round(outputs * experts_per_token.get(group, 1.0))), inputs
    return found


def spread(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """The value of each name: its own, or that of its group; names without either are left out."""
    found = {}
    for name in names:
        key = name if name in values else group_of(name)
        if key in values:
            found[name] = values[key]
    return found


def weights_read(shapes: Mapping[str, tuple[int, int]], experts_per_token: Mapping[str, float]) -> dict[str, float]:
    """How many weights of each matrix a token reads when it is dense, on average.

    Args:
        shapes: (N, K) by qualified name.
        experts_per_token: how many experts a token is sent to, by group; a group that is not there is read whole.

    Returns:
        N·K by qualified name, times the share of tokens that an expert gets.
    """
    sizes = {group: len(names) for group, names in groups(shapes).items()}
    found = {}
    for name, (outputs, inputs) in shapes.items():
        group = group_of(name)
        share = experts_per_token[group] / sizes[group] if group in experts_per_token else 1.0
        found[name] = outputs * inputs * share
    return found

"""A schedule's numbers as the tensors of a file, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from was_fx.schedules.files.linear_schedule import LinearSchedule

_SCALARS = ("sparsity", "threshold", "exponent")
_CHANNELS = "channel_threshold"


def pack_linears(linears: Mapping[str, LinearSchedule]) -> dict[str, Tensor]:
    """`<qualified name>.sparsity|.threshold|.exponent`, fp32 scalars, and `.channel_threshold`, fp32 [K]."""
    tensors = {}
    for name, linear in linears.items():
        for field in _SCALARS:
            tensors[f"{name}.{field}"] = torch.tensor(getattr(linear, field), dtype=torch.float32)
        if linear.channel_threshold is not None:
            tensors[f"{name}.{_CHANNELS}"] = linear.channel_threshold
    return tensors


def unpack_linears(
    tensors: Mapping[str, Tensor], order: Mapping[str, object]
) -> tuple[dict[str, LinearSchedule], list[str]]:
    """The inverse of `pack_linears`, in the given order of names, and what is wrong with the tensors.

    A Linear with a problem is left out of the first and named in the second.
    """
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in order}
    problems = []
    for key, tensor in sorted(tensors.items()):
        name, _, field = key.rpartition(".")
        if not name or field not in (*_SCALARS, _CHANNELS):
            problems.append(f"unknown tensor {key}: expected <Linear>.{'|'.join((*_SCALARS, _CHANNELS))}")
            continue
        fields.setdefault(name, {})[field] = tensor
    linears = {}
    for name, found in fields.items():
        wrong = _tensor_problems(name, found)
        problems += wrong
        if wrong and name not in order:
            problems.append(f"{name} has no shape")
        if not wrong:
            scalars = {field: found[field].item() for field in _SCALARS}
            linears[name] = LinearSchedule(**scalars, channel_threshold=found.get(_CHANNELS))
    return linears, problems


def _tensor_problems(name: str, found: Mapping[str, Tensor]) -> list[str]:
    if not found:
        return [f"{name} has a shape but no tensors"]
    problems = [f"{name}.{field} is missing" for field in _SCALARS if field not in found]
    for field, tensor in found.items():
        rank = 1 if field == _CHANNELS else 0
        if tensor.dtype != torch.float32 or tensor.ndim != rank:
            dtype = str(tensor.dtype).removeprefix("torch.")
            expected = "float32 [K]" if rank else "a float32 scalar"
            problems.append(f"{name}.{field} is {dtype} {list(tensor.shape)}, expected {expected}")
    return problems

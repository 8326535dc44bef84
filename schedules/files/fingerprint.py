"""Which model a schedule belongs to, from a few values of each weight."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 64


def fingerprint(architecture: str, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Identify a model by its architecture, its Linears' shapes and a sample of their values.

    The sample is 64 values per weight at fixed (row, column) positions, rounded to bf16: it depends neither
    on strides nor on whether a bf16 checkpoint was loaded as bf16 or fp32. All samples of one device reach
    the CPU in one transfer.

    Args:
        architecture: the model's class name.
        weights: [N, K] by qualified name, with values, any floating dtype and strides; the order does not matter.

    Returns:
        `architecture`, and the SHA-256 digests `shapes` and `weights` in hexadecimal. JSON can hold it.
    """
    content = hashlib.sha256()
    for sample in _samples([weights[name].detach() for name in sorted(weights)]):
        content.update(sample)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    return {**fingerprint_without_weights(architecture, shapes), "weights": content.hexdigest()}


def fingerprint_without_weights(architecture: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """What can be said of a model whose weights are not at hand: `fingerprint` without `weights`.

    It tells one architecture and size from another, but not two checkpoints of one size.

    Args:
        architecture: the model's class name.
        shapes: (N, K) of all its Linears, the head included, by qualified name; the order does not matter.
    """
    listed = json.dumps([[name, *shapes[name]] for name in sorted(shapes)])
    return {"architecture": architecture, "shapes": hashlib.sha256(listed.encode()).hexdigest()}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """How the model with the fingerprint `found` differs from the one with `expected`, a line each.

    Weights are compared only where both fingerprints have them.
    """
    lines = []
    if expected.get("architecture") != found.get("architecture"):
        lines.append(f"the architecture is {found.get('architecture')}, expected {expected.get('architecture')}")
    if expected.get("shapes") != found.get("shapes"):
        lines.append("the names or shapes of the Linears are others")
    elif "weights" in expected and "weights" in found and expected["weights"] != found["weights"]:
        lines.append("the weights have other values (another checkpoint or a fine-tuned one)")
    return lines


def _samples(weights: list[Tensor]) -> list[bytes]:
    """The bf16 bytes of each weight's sample, in order, with one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for position, weight in enumerate(weights):
        by_device.setdefault(weight.device, []).append(position)
    samples = [b""] * len(weights)
    for device, positions in by_device.items():
        shapes = {weights[p].shape for p in positions}
        at = {shape: _positions(shape[0], shape[1], device) for shape in shapes}
        values = [weights[p][at[weights[p].shape]].to(torch.bfloat16) for p in positions]
        gathered = torch.stack(values).cpu().view(torch.int16).numpy()
        for position, row in zip(positions, gathered, strict=True):
            samples[position] = row.astype("<i2").tobytes()
    return samples


def _positions(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions spread over a matrix by a Kronecker sequence: fractions of i·(√5−1)/2 and i·(√2−1)."""
    steps = torch.arange(_SAMPLES, dtype=torch.int64)
    row = (steps * 40503 % 65536) * rows >> 16
    column = (steps * 27146 % 65536) * columns >> 16
    return row.to(device), column.to(device)

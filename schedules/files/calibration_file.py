"""A calibration's numbers as the tensors and strings of a file, and back; what can be wrong with them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from was_fx.schedules.files.fisher_scores import FisherScores
from was_fx.schedules.files.metadata import MetadataReader, Shapes, is_matrix_shape
from was_fx.schedules.score import Score

_LEVELS = "levels"
_SUFFIX = ".thresholds"
_WEIGHTS, _FISHER = ".fisher_weights", ".fisher_thresholds"


def pack(levels: Tensor, thresholds: Mapping[str, Tensor], fisher: FisherScores | None = None) -> dict[str, Tensor]:
    """`levels` fp32 [L], and `<qualified name>.thresholds` fp32 [L] of each Linear; with Fisher scores also
    `<qualified name>.fisher_weights` fp32 [K] and `<qualified name>.fisher_thresholds` fp32 [L]."""
    packed = {_LEVELS: levels, **{name + _SUFFIX: values for name, values in thresholds.items()}}
    if fisher is not None:
        packed |= {name + _WEIGHTS: values for name, values in fisher.weights.items()}
        packed |= {name + _FISHER: values for name, values in fisher.thresholds.items()}
    return packed


def unpack(
    tensors: Mapping[str, Tensor], order: Mapping[str, object]
) -> tuple[Tensor, dict[str, Tensor], FisherScores | None, list[str]]:
    """The inverse of `pack`, in the given order of names, and which tensors are unknown.

    Levels that are missing are given back as an empty tensor.
    """
    found = {key.removesuffix(_SUFFIX): tensors[key] for key in sorted(tensors) if key.endswith(_SUFFIX)}
    thresholds = {name: found.pop(name) for name in order if name in found}
    parts = [_named(tensors, suffix) for suffix in (_WEIGHTS, _FISHER)]
    fisher = FisherScores(*parts) if any(parts) else None
    unknown = [key for key in sorted(tensors) if key != _LEVELS and not key.endswith((_SUFFIX, _WEIGHTS, _FISHER))]
    problems = [f"unknown tensor {key}: expected {_LEVELS} or <Linear>{_SUFFIX}" for key in unknown]
    return tensors.get(_LEVELS, torch.empty(0)), {**thresholds, **found}, fisher, problems


def _named(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {key.removesuffix(suffix): tensors[key] for key in sorted(tensors) if key.endswith(suffix)}


def unpack_settings(reader: MetadataReader) -> tuple[Score, Shapes, int, str, dict[str, Any], tuple[str, ...]]:
    """Score, shapes, tokens, text, fingerprint and excluded Linears; what is wrong is noted in the reader."""
    try:
        score = Score(reader.value("exponent", (int, float), 1.0), reader.value("norm", int, 1))
    except ValueError as error:
        reader.problems.append(str(error))
        score = Score()
    shapes, tokens = reader.shapes("shapes"), reader.value("tokens", int, 0)
    fingerprint = reader.value("fingerprint", dict, {})
    return score, shapes, tokens, reader.text("text"), fingerprint, reader.names("excluded")


def calibration_problems(
    levels: Tensor, thresholds: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], tokens: int
) -> list[str]:
    """Everything wrong with a calibration's numbers, one line per problem."""
    problems = [] if thresholds else ["no Linear is calibrated"]
    if tokens < 1:
        problems.append(f"the calibration has {tokens} tokens, expected at least 1")
    if not _is_fp32_vector(levels) or levels.numel() < 2:
        problems.append(f"the levels are {_kind(levels)}, expected float32 [L] with L of at least 2")
    elif not (levels[0] == 0 and levels[-1] < 1 and bool((levels.diff() > 0).all())):
        problems.append("the levels must increase from 0 to below 1")
    problems += [f"{name} has a shape but no thresholds" for name in shapes if name not in thresholds]
    for name, values in thresholds.items():
        if not is_matrix_shape(shapes.get(name)):
            problems.append(f"{name} has thresholds, but the shape {shapes.get(name)}: expected (N, K)")
        if not _is_fp32_vector(values) or values.shape != levels.shape:
            problems.append(f"{name}: the thresholds are {_kind(values)}, expected float32 {list(levels.shape)}")
        elif not bool((values.isfinite() & (values >= 0)).all()):
            problems.append(f"{name}: the thresholds hold NaN, infinite or negative values")
        elif not bool((values.diff() >= 0).all()):
            problems.append(f"{name}: the thresholds decrease where the sparsity increases")
    return problems


def _is_fp32_vector(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.ndim == 1


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

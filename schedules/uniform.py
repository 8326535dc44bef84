"""Uniform allocation: every Linear gets the target."""

from collections.abc import Collection

from was_fx.schedules.calibration import Calibration
from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.names import unknown_problems
from was_fx.schedules.schedule import LinearSchedule, Schedule, ScheduleMetadata


def uniform(calibration: Calibration, target: float, *, exclude: Collection[str] = ()) -> Schedule:
    """Schedule every calibrated Linear at the same sparsity.

    Args:
        calibration: thresholds by sparsity of each Linear.
        target: the model sparsity, at least 0 and at most the calibration's last level (0.999).
        exclude: qualified names of Linears to leave dense; they do not count in the model sparsity.

    Raises:
        ValueError: for a target out of range.
        ScheduleError: for an excluded name that was not calibrated, or if no Linear is left.
    """
    if not 0 <= target < 1:
        raise ValueError(f"the target sparsity must be at least 0 and below 1, found {target!r}")
    unknown = [name for name in exclude if name not in calibration.shapes]
    if unknown:
        problems = unknown_problems(unknown, calibration.shapes, "was not calibrated")
        raise ScheduleError("these Linears cannot be excluded", problems, "Give names of the calibration.")
    shapes = {name: shape for name, shape in calibration.shapes.items() if name not in exclude}
    exponent = calibration.score.exponent
    linears = {name: LinearSchedule(target, calibration.threshold(name, target), exponent) for name in shapes}
    return Schedule(
        linears,
        shapes,
        norm=calibration.score.norm,
        metadata=ScheduleMetadata(
            recipe="uniform",
            target=target,
            excluded=tuple(name for name in calibration.shapes if name in exclude),
            calibration_text=calibration.text,
            calibration_tokens=calibration.tokens,
            fingerprint=calibration.fingerprint,
        ),
    )

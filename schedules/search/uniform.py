"""Uniform allocation: every Linear gets the target."""

from collections.abc import Iterable

from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.schedule import LinearSchedule, Schedule
from was_fx.schedules.selection import select


def uniform(
    calibration: Calibration,
    target: float,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Schedule:
    """Schedule calibrated Linears at the same sparsity.

    Args:
        calibration: thresholds by sparsity of each Linear.
        target: the model sparsity, at least 0 and at most the calibration's last level (0.999).
        include: qualified names of the Linears to schedule, or patterns of them (see `was_fx.schedules.selection`);
            by default all that were calibrated.
        exclude: those to leave dense; they do not count in the model sparsity.

    Returns:
        A `Schedule` with the calibration's score and thresholds τ in its units.

    Raises:
        ValueError: for a target out of range.
        ScheduleError: for a name or pattern that matches no calibrated Linear, or if none is left.
    """
    if not 0 <= target < 1:
        raise ValueError(f"the target sparsity must be at least 0 and below 1, found {target!r}")
    shapes = {name: calibration.shapes[name] for name in select(calibration.shapes, include, exclude)}
    exponent = calibration.score.exponent
    linears = {name: LinearSchedule(target, calibration.threshold(name, target), exponent) for name in shapes}
    return Schedule(
        linears,
        shapes,
        norm=calibration.score.norm,
        metadata=calibration.metadata("uniform", target, shapes),
    )

"""From the sparsities that a search speaks of to the thresholds that a model runs by."""

from collections.abc import Mapping
from dataclasses import dataclass

from was_fx.schedules.experts import spread
from was_fx.schedules.files.calibration import Calibration
from was_fx.schedules.files.linear_schedule import LinearSchedule
from was_fx.schedules.files.schedule import Schedule, ScheduleMetadata


@dataclass(frozen=True, eq=False)
class ThresholdTable:
    """Thresholds by sparsity of each Linear, each with an exponent of its own.

    Attributes:
        scores: quantiles of |x_j|·g_j^α with the Linear's own α.
        exponents: α by qualified name.
        norm: p of the channel norms.
        signed: the quantiles are those of max(x_j, 0)·g_j^α; a sparsity s is read at 0.5 + s/2, as if activations were
            symmetric.
    """

    scores: Calibration
    exponents: Mapping[str, float]
    norm: int
    signed: bool = False

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) by qualified name."""
        return self.scores.shapes

    def linear(self, name: str, sparsity: float) -> LinearSchedule:
        """The schedule entry of a Linear at a sparsity.

        Raises:
            ValueError: for an unknown Linear or a sparsity out of the table's range.
        """
        level = 0.5 + sparsity / 2 if self.signed else sparsity
        return LinearSchedule(sparsity, self.scores.threshold(name, level), self.exponents[name])

    def schedule(self, sparsities: Mapping[str, float], metadata: ScheduleMetadata) -> Schedule:
        """The schedule with these sparsities, from 0 to below 1, of all Linears by qualified name, or by their group.

        Raises:
            ValueError: a sparsity is out of the table's range.
        """
        linears = {name: self.linear(name, each) for name, each in spread(sparsities, self.shapes).items()}
        return Schedule(linears, self.shapes, self.norm, metadata)


def from_calibration(calibration: Calibration) -> ThresholdTable:
    """The table of a calibration: its score for every Linear."""
    exponents = dict.fromkeys(calibration.shapes, calibration.score.exponent)
    return ThresholdTable(calibration, exponents, calibration.score.norm)

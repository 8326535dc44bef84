"""The error of a file or a set of numbers that cannot be used as it stands."""

from collections.abc import Sequence

from was_fx.schedules.names import visible

_SHOWN = 50


class ScheduleError(ValueError):
    """Everything that is wrong with a schedule or a calibration, in one error.

    Its message has a line for each problem; control characters in names are written out, so that they add none.

    Attributes:
        headline: what cannot be done, in one line.
        problems: one line per problem, all of them; the message shows the first 50.
        remedy: what the reader can do about it.
    """

    def __init__(self, headline: str, problems: Sequence[str] = (), remedy: str = "") -> None:
        self.headline = headline
        self.problems = list(problems)
        self.remedy = remedy
        super().__init__(headline, self.problems, remedy)

    def __str__(self) -> str:
        lines = [visible(self.headline) + (":" if self.problems else "")]
        lines += [f"  - {visible(problem)}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  - and {len(self.problems) - _SHOWN} more (all are in the error's `problems`)")
        if self.remedy:
            lines.append(self.remedy)
        return "\n".join(lines)

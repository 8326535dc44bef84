"""What a search shows on stderr while it runs."""

from types import TracebackType
from typing import TYPE_CHECKING

from rich.text import Text

from was_fx.cli.render.console import is_quiet, note, stderr
from was_fx.schedules.names import visible

if TYPE_CHECKING:
    from rich.status import Status

    from was_fx.schedules.search.block_search import SearchState

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(levels: "tuple[float, ...]") -> str:
    """Levels by block as bars, the lowest to the highest: `▁▃▅█`; of equal ones the middle."""
    low, high = min(levels, default=0.0), max(levels, default=0.0)
    if high - low < 1e-6:
        return _BARS[3] * len(levels)
    return "".join(_BARS[round((level - low) / (high - low) * (len(_BARS) - 1))] for level in levels)


def progress_line(state: "SearchState") -> str:
    """One line: trials, best value, the incumbent's shape over the blocks, time left, whose time it was."""
    if not state.levels:
        return f"{state.phase} {state.done + 1}/{state.total}" if state.total else state.phase
    left = "" if state.seconds_left is None else f", {_time(state.seconds_left)} left"
    shape = f"{sparkline(state.levels)} {100 * min(state.levels):.0f}–{100 * max(state.levels):.0f} %"
    spent = f"trials {state.objective_seconds:.0f} s, optimiser {state.optimizer_seconds:.0f} s"
    return f"trial {state.done}/{state.total}, best {state.best:.4f}, blocks {shape}{left} ({spent})"


class SearchDisplay:
    """A line that is kept up to date on a terminal; without one, a line per tenth of the search and per step.

    Attributes:
        seconds: spent waiting for trials and in the optimiser.
    """

    def __init__(self) -> None:
        self._console = stderr()
        self._status: Status | None = None
        self._shown = ""
        self.seconds = (0.0, 0.0)

    def __enter__(self) -> "SearchDisplay":
        if self._console.is_terminal and not is_quiet():
            self._status = self._console.status("searching")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, state: "SearchState") -> None:
        """Show how far the search is."""
        if state.levels:
            self.seconds = (state.objective_seconds, state.optimizer_seconds)
        if self._status is not None:
            self._status.update(Text(visible(progress_line(state))))
            return
        tenth = state.phase if not state.levels else f"{10 * state.done // max(state.total, 1)}"
        if tenth != self._shown:
            self._shown = tenth
            note(progress_line(state), style="")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"

"""How long work tells its caller how far it is."""

from collections.abc import Callable

# Called with (steps done, all steps).
Progress = Callable[[int, int], None]


def report(progress: Progress | None, done: int, total: int) -> None:
    """Tell whoever asked how far it is."""
    if progress is not None:
        progress(done, total)

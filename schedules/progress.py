"""How long work tells its caller how far it is."""

from collections.abc import Callable

# Called with (steps done, all steps).
Progress = Callable[[int, int], None]

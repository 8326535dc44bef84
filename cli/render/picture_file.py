"""Pictures by matplotlib, written whole or not at all; the same picture is the same file."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from was_fx.schedules.files.atomic import write_atomically


def write_picture(
    path: Path,
    size: tuple[float, float],
    dpi: int,
    draw: Callable[[Any], None],
    settings: dict[str, Any] | None = None,
) -> None:
    """Draw into a file whose ending says the format.

    Args:
        path: of the file.
        size: width and height, inches.
        dpi: dots per inch.
        draw: called with the figure.
        settings: of matplotlib, beside a grid.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("--plot needs matplotlib; install it with: pip install 'was-fx[plot]'") from error

    buffer, format = io.BytesIO(), path.suffix[1:].lower()
    # A fixed salt and no date: SVG identifiers and metadata are the same each time.
    fixed: Any = {"svg.hashsalt": "was-fx", "axes.grid": True, "grid.alpha": 0.3, **(settings or {})}
    with matplotlib.rc_context(fixed):
        figure = Figure(figsize=size, layout="constrained", dpi=dpi)
        draw(figure)
        date = {"CreationDate" if format == "pdf" else "Date": None}
        figure.savefig(buffer, format=format, metadata=None if format == "png" else date)
    write_atomically(path, buffer.getvalue())

"""Files of JSON lines that grow by one at a time, and are whole after a kill."""

import os
from pathlib import Path


def append_line(path: Path, line: str) -> None:
    """Add a line, which is on the disk when this returns; a kill may leave a part of it at the end.

    Raises:
        OSError: the file can't be written.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(data: bytes) -> bytes:
    """What a file holds without the part of a line that a kill may have left at its end."""
    return data[: data.rfind(b"\n") + 1]

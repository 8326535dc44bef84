"""A command at a terminal of its own, and what is typed into it."""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any


class Terminal:
    """A process behind a pseudo-terminal of so many columns.

    Attributes:
        shown: all that it has drawn.
    """

    def __init__(self, arguments: Sequence[object], columns: int = 80, **environment: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", **environment}
        environment.pop("COLUMNS", None)
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execve(sys.executable, [sys.executable, *map(str, arguments)], environment)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.shown, self._waited = "", 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def until(self, text: str, seconds: float = 100) -> str:
        """Wait until `text` is drawn, after what was waited for before; what was drawn from there to its end."""
        begin, end = self._waited, time.monotonic() + seconds
        while (found := self.shown.find(text, begin)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[begin:]!r}"
            assert self._read(), f"it ended without {text!r}: {self.shown!r}"
        self._waited = found + len(text)
        return self.shown[begin : self._waited]

    def type(self, text: str) -> None:
        """Press keys; `\\x03` is Ctrl-C, `\\x04` Ctrl-D."""
        os.write(self._fd, text.encode())

    def interrupt_input(self) -> None:
        """Press Ctrl-C at a prompt. CPython's input() shows it a moment before it can be interrupted."""
        time.sleep(1)
        self.type("\x03")

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        while self._read():
            pass
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], 100)
        assert ready, f"nothing more after {self.shown!r}"
        try:
            found = os.read(self._fd, 65536)
        except OSError:  # its side is closed
            return False
        self.shown += found.decode(errors="replace")
        return bool(found)

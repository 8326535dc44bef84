"""Writing a file, or a folder, whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write `data` (a string as UTF-8) so that the file at `path` is the old one or the new one, never a part.

    A file that is replaced keeps its permissions, a new one gets those of the umask; a symbolic link stays one.

    Raises:
        OSError: (or its fitting subclass) if the directory is missing, not writable or full; what was there before is
            then untouched.
    """
    target = Path(os.path.realpath(path))
    # A short name of its own: one made of the file's could be too long for the file system.
    temporary = target.with_name(f".was_fx.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        message = f"cannot write the file ({reason}); choose an existing directory that is writable and has room"
        raise OSError(error.errno or errno.EIO, message, str(path)) from error


@contextlib.contextmanager
def folder_written_atomically(path: str | Path) -> Iterator[Path]:
    """An empty folder to be filled, which takes the place of the folder at `path` when the context ends without error.

    What was at `path` is deleted then; until then it is untouched, and after an error nothing new is left.

    Raises:
        OSError: (or its fitting subclass) if the directory that it lies in is missing or not writable.
    """
    target = Path(os.path.realpath(path))
    made = target.with_name(f".was_fx.{secrets.token_hex(8)}.tmp")
    old = made.with_suffix(".old")
    made.mkdir()
    try:
        yield made
        if target.exists():
            os.replace(target, old)
        os.replace(made, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        for folder in (made, old):
            shutil.rmtree(folder, ignore_errors=True)

"""Reading schedules and calibrations by what they are, and checking an output path before the work starts."""

import contextlib
import errno
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from was_fx.schedules.names import suggestion

if TYPE_CHECKING:
    from was_fx import Calibration, Schedule


def load_any(path: Path) -> "Schedule | Calibration":
    """The schedule or calibration in a file, or the published schedule of that name."""
    from was_fx import Calibration
    from was_fx.schedules.files.storage import CALIBRATION

    return Calibration.load(path) if _kind(path) == CALIBRATION else load_schedule(path)


def load_schedule(path: Path) -> "Schedule":
    """The schedule in a file, or else the published one of that name.

    Every command's schedules come through here. A calibration is refused with the command that makes a schedule of it.

    Raises:
        ValueError, OSError: there is neither; says the nearest name.
    """
    from was_fx import Schedule
    from was_fx.schedules.files.storage import CALIBRATION

    if not path.exists():
        return _published(path)
    if _kind(path) == CALIBRATION:
        raise ValueError(
            f"{path} is a calibration, not a schedule; make one of it: was make {shlex.quote(str(path))} --target 0.5"
        )
    return Schedule.load(path)


def _published(path: Path) -> "Schedule":
    from was_fx.schedules.released.published import load_published, published_names

    name = str(path)
    if name in published_names():
        return load_published(name)
    near = suggestion(name, published_names()) or suggestion(path.name, _schedules_beside(path))
    raise FileNotFoundError(
        errno.ENOENT,
        f"there is no was-fx schedule here, nor is one published under that name{near}; give a file, or a name of "
        "was published list",
        name,
    )


def _schedules_beside(path: Path) -> list[str]:
    """Names of files in the same folder that may be schedules."""
    with contextlib.suppress(OSError):
        return sorted(each.name for each in path.parent.iterdir() if each.suffix == ".safetensors")
    return []


def load_calibration(path: Path) -> "Calibration":
    """The calibration in a file; a schedule is refused."""
    from was_fx import Calibration
    from was_fx.schedules.files.storage import SCHEDULE

    if _kind(path) == SCHEDULE:
        raise ValueError(f"{path} is a schedule already; look at it with: was inspect {shlex.quote(str(path))}")
    return Calibration.load(path)


def short_name(schedule: str | Path) -> str:
    """What a schedule is called in few letters: its file's name without the endings."""
    return Path(schedule).name.removesuffix(".safetensors").removesuffix(".was")


def read_levels(path: Path) -> list[float]:
    """Shares from 0 to below 1 in a JSON list.

    Raises:
        ValueError: the file holds something else.
        OSError: it can't be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a list of levels such as [0.55, 0.6]") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds {str(found)[:40]!r}; expected a JSON list of levels, one for each block")
    wrong = [value for value in found if type(value) not in (int, float) or not 0 <= value < 1]
    if wrong:
        raise ValueError(f"{path}: {str(wrong[0])[:40]!r} is no level; expected shares from 0 to below 1")
    return [float(value) for value in found]


def check_output(path: Path, force: bool, option: str = "--out") -> None:
    """Refuse an output path that cannot or must not be written; `option` is what gave it.

    Raises:
        OSError: with a remedy.
    """
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the path of a file", str(path))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, "cannot be written; choose an existing directory that is writable", str(path))
    if path.exists() and not force:
        message = f"exists already; give another {option}, or --force to replace it"
        raise FileExistsError(errno.EEXIST, message, str(path))


def check_output_folder(path: Path, model: str, force: bool) -> None:
    """Refuse an output folder that cannot or must not be written.

    Args:
        path: of the folder.
        model: the directory that is read, which may not be replaced.
        force: replace a folder that was-fx wrote.

    Raises:
        OSError: with a remedy.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(errno.EACCES, "cannot be written; choose an existing directory that is writable", str(path))
    if not path.exists():
        return
    if Path(model).exists() and path.samefile(model):
        raise FileExistsError(errno.EEXIST, "is the model that is read; give another --out", str(path))
    if not force:
        raise FileExistsError(errno.EEXIST, "exists already; give another --out, or --force to replace it", str(path))
    if not _is_ours(path):
        raise FileExistsError(errno.EEXIST, "is no model that was-fx saved, so --force doesn't replace it", str(path))


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that was-fx saved, or nothing."""
    if not folder.is_dir():
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "was"
    except (OSError, ValueError, KeyError, TypeError):
        return not any(folder.iterdir())


def _kind(path: Path) -> str | None:
    """The format that a safetensors file's metadata names; None if it can't be told."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None  # the loader says what is wrong

"""Files of named tensors and string metadata: safetensors, written atomically, the same bytes every time."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from was_fx.schedules.errors import ScheduleError
from was_fx.schedules.files.atomic import write_atomically

FORMAT_VERSION = 1
SCHEDULE = "was-fx schedule"
CALIBRATION = "was-fx calibration"
_LOADERS = {SCHEDULE: "Schedule.load", CALIBRATION: "Calibration.load"}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as a file of `kind` (`SCHEDULE` or `CALIBRATION`).

    Args:
        path: of the file; its folder must exist.
        kind: what the metadata names as the format.
        tensors: any shapes and dtypes that safetensors knows, contiguous, none sharing memory with another.
        metadata: strings.

    Raises:
        OSError: if the file cannot be written; an older file at `path` is then untouched.
    """
    tags = {"format": kind, "format_version": str(FORMAT_VERSION)}
    write_atomically(path, encode(tensors, {**metadata, **tags}))


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file of `kind`, the tags `format` and `format_version` removed.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        ScheduleError: if the file is not a whole safetensors file, of another kind, or of a newer format.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        message = f"there is no {kind} here; check the path, or save one first"
        raise FileNotFoundError(errno.ENOENT, message, str(path)) from error
    except IsADirectoryError as error:
        inside = ", ".join(sorted(each.name for each in Path(path).glob("*was*.safetensors"))[:3])
        message = f"is a folder; give the path of a {kind}" + (f", such as {inside} in it" if inside else "")
        raise IsADirectoryError(errno.EISDIR, message, str(path)) from error
    tensors, metadata = _decode(data, path, kind)
    _check_tags(path, kind, metadata.pop("format", None), metadata.pop("format_version", ""))
    return tensors, metadata


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the same for the same content, in whatever order it comes."""
    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    # safetensors writes the metadata in a random order, so the header is written again, sorted.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _decode(data: bytes, path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        if data.startswith(_PICKLES):
            raise ScheduleError(
                f"{path} is a pickle or zip archive (a .pt file?), not a {kind}: nothing was loaded",
                remedy="Give a safetensors file that was-fx saved, or convert the artifact with an importer.",
            ) from error
        raise ScheduleError(
            f"{path} is not a safetensors file, or only a part of one ({error})",
            remedy=f"Expected a {kind}: copy or save it again.",
        ) from error
    end = 8 + int.from_bytes(data[:8], "little")
    return tensors, json.loads(data[8:end]).get("__metadata__") or {}


def _check_tags(path: str | Path, kind: str, found: str | None, version: str) -> None:
    if found != kind:
        raise ScheduleError(
            f"{path} is not a {kind}: its metadata names the format {found!r}",
            remedy=f"Load it with {_LOADERS[found]}." if found in _LOADERS else "Check the path.",
        )
    if not version.isdecimal() or int(version) < 1:
        raise ScheduleError(
            f"{path} has the format version {version!r}, expected a whole number from 1 to {FORMAT_VERSION}",
            remedy="The file is damaged: copy or save it again.",
        )
    if int(version) > FORMAT_VERSION:
        raise ScheduleError(
            f"{path} has the format version {version}, newer than the {FORMAT_VERSION} that is read here",
            remedy="Update was-fx, or save the file again with this version.",
        )

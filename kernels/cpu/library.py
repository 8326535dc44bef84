"""The C++ kernels of this folder as one shared library, and which kind of them this processor runs.

An installed was-fx holds the library. A checkout compiles it when it is first needed, in one call of the C++ compiler
(`CXX`, else g++, else clang++), and keeps it in the user's cache. Without either, plain torch does the work.

`WAS_FX_CPU_KERNELS=avx2` (or any other name of `KINDS`) holds the kernels to less than the processor has.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from was_fx.kernels.parts.user_cache import user_cache

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("kernels.cpp", "body.inc", "program.inc", "pairs.inc")
FLAGS = ("-std=c++17", "-O2", "-fopenmp", "-fPIC", "-shared")

# Kinds of kernels, each with what the ones before it have; `enum Kind` in kernels.cpp.
KINDS = ("plain", "avx2", "avx512", "avx512bf16", "amx")
LIMIT = "WAS_FX_CPU_KERNELS"
# What the library calls the dtypes of x and the weights.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none (said once, with what it costs)."""
    loaded, _, missing = _find()
    if loaded is None:
        log.warning("on this CPU every token takes about twice as long: %s", missing)
    return loaded


def origin() -> tuple[Path | None, str]:
    """The file that holds the kernels; or None, and why there is none and what to do. Looks anew, and may compile."""
    _, path, missing = _find()
    return path, missing


def _find() -> tuple[ctypes.CDLL | None, Path | None, str]:
    """The kernels, their file, and where there are none a sentence that says why and what to do."""
    source = source_hash()
    for path in FOLDER.glob("cpu_kernels*" + (sysconfig.get_config_var("SHLIB_SUFFIX") or ".so")):
        loaded = _load(path, source)
        if loaded is not None:
            return loaded, path, ""
    try:
        built = compiled(source)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
        return None, None, f"the C++ kernels can't be compiled; set CXX to another compiler. It said:\n{output[-2000:]}"
    if built is None:
        return None, None, "no C++ compiler found; install g++, or set CXX to a compiler"
    loaded = _load(built, source)
    if loaded is None:
        return None, None, f"the C++ kernels in {built} can't be loaded; delete the file to compile them anew"
    return loaded, built, ""


@functools.cache
def kind() -> int:
    """The position in `KINDS` of the kernels to run here: the processor's, or what `WAS_FX_CPU_KERNELS` says.

    Raises:
        ValueError: the variable names no kind.
    """
    loaded = library()
    assert loaded is not None
    found = int(loaded.was_processor())
    wanted = os.environ.get(LIMIT)
    if not wanted:
        return found
    if wanted not in KINDS:
        raise ValueError(f"{LIMIT} is {wanted!r}; expected one of {', '.join(KINDS)}")
    return min(found, KINDS.index(wanted))


def source_hash() -> str:
    """Tells a library made of these sources from one made of others."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def compiled(source: str) -> Path | None:
    """Path of the library in the user's cache, compiled unless it is there; None without a compiler.

    Raises:
        OSError, subprocess.CalledProcessError: the compiler failed.
        ValueError: `CXX` can't be read.
    """
    folder = _private_cache()
    target = folder / f"cpu_kernels_{source}.so"
    if target.exists() and _is_ours(target):
        return target
    compiler = _compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(dir=folder) as made_in:
        made = Path(made_in) / target.name
        define = f'-DWAS_SOURCE="{source}"'
        command = [*compiler, *FLAGS, define, str(FOLDER / SOURCES[0]), "-o", str(made)]
        subprocess.run(command, capture_output=True, check=True)
        os.replace(made, target)  # whole or not at all, also when two processes compile
    return target


def _compiler() -> list[str] | None:
    """The command, `CXX` with its arguments or a usual name; None where there is no such program."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    return None


def _private_cache() -> Path:
    """A folder that only this user can write, because what lies in it is run: in their cache, else a temporary one."""
    folder = user_cache()
    try:
        if folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
            if _is_ours(folder) and os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    """For this process, removed at its end."""
    folder = tempfile.mkdtemp(prefix="was_fx_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_ours(path: Path) -> bool:
    """Whether it belongs to this user, and nobody else may write it."""
    found = path.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        return False
    return not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _load(path: Path, source: str) -> ctypes.CDLL | None:
    """The library at `path`, unless it is of other sources or can't be loaded."""
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.was_source.restype = ctypes.c_char_p
        loaded.was_processor.restype = ctypes.c_int64
        if loaded.was_source() != source.encode():
            return None
    except (OSError, AttributeError):
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.was_gather.restype = loaded.was_gather_one.restype = None
    loaded.was_product.restype = loaded.was_rows.restype = None
    loaded.was_gather.argtypes = [number] * 3 + [pointer] * 6 + [number] * 4 + [pointer] * 3
    loaded.was_gather_one.argtypes = [number] * 2 + [pointer] * 4 + [number, pointer] + [number] * 3
    loaded.was_run.restype, loaded.was_run.argtypes = number, [number, pointer, number, number]
    loaded.was_parts.restype, loaded.was_parts.argtypes = number, [number] * 3
    loaded.was_write_out.restype = None
    loaded.was_write_out.argtypes = [number] * 2 + [pointer] * 3 + [number] * 3 + [pointer, number]
    loaded.was_product.argtypes = loaded.was_rows.argtypes = [number] * 2 + [pointer] * 4 + [number] * 4
    return loaded

"""What this machine has that the kernels use."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from was_fx.kernels.cpu.library import KINDS, LIMIT, kind, origin
from was_fx.kernels.parts.gemv_config import device_file, multiprocessors, tuned
from was_fx.measure.machine import processor_name

# As Linux calls them, for x86 and ARM.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm"),
)


@dataclass(frozen=True)
class Processor:
    """The CPU.

    Attributes:
        name: as it calls itself.
        features: instructions that matter here; empty where the system doesn't say.
        cores: that the system has.
        threads: that torch uses.
        kernels: the kind of C++ kernels that runs, one of `KINDS`; "" where there are none.
        path: the file that holds them.
        problem: why there are none and what to do, or what else is wrong; "" if nothing is.
    """

    name: str
    features: tuple[str, ...]
    cores: int
    threads: int
    kernels: str
    path: str
    problem: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        index: of it.
        name: as it calls itself.
        memory: bytes.
        free: bytes that are free.
        capability: (major, minor).
        multiprocessors: how many.
        measured: products whose tile sizes were measured on such a GPU; those of others are by a rule.
        ahead: whether kernels are launched before those before them have ended (programmatic dependent launch).
        triton: whether Triton is installed, which the kernels need.
        problem: what is wrong and what to do; "" if nothing is.
    """

    index: int
    name: str
    memory: int
    free: int
    capability: tuple[int, int]
    multiprocessors: int
    measured: int
    ahead: bool
    triton: bool
    problem: str


def processor() -> Processor:
    """This machine's, with the kernels that it runs."""
    path, problem = origin()
    kernels = ""
    if path is not None:
        try:
            kernels = KINDS[kind()]
        except ValueError as error:
            problem = f"{error}; unset {LIMIT} to use all that the processor has"
    return Processor(
        name=processor_name(),
        features=tuple(each for each in _FEATURES if each in _flags()),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        kernels=kernels,
        path=str(path or ""),
        problem=problem,
    )


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def gpus() -> list[Gpu]:
    """The CUDA devices that torch finds."""
    triton = find_spec("triton") is not None
    problem = "" if triton else "triton is not installed, without which a GPU runs dense; run pip install triton"
    found = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        device = torch.device("cuda", index)
        try:
            measured = len(tuned(device_file(device)))
        except ValueError as error:  # a damaged file of tile sizes
            measured, problem = 0, problem or str(error)
        found.append(
            Gpu(
                index=index,
                name=torch.cuda.get_device_name(index),
                memory=memory,
                free=free,
                capability=torch.cuda.get_device_capability(index),
                multiprocessors=multiprocessors(device),
                measured=measured,
                ahead=triton and _launches_ahead(device),
                triton=triton,
                problem=problem,
            )
        )
    return found


def _launches_ahead(device: torch.device) -> bool:
    from was_fx.kernels.parts.triton_parts import launches_ahead  # imports triton

    return launches_ahead(device)

"""`diagnose`: everything that decides whether was-fx works, and works fast, on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from was_fx.doctor.hardware import Gpu, Processor, gpus, processor
from was_fx.doctor.installation import Cache, Package, PlugIn, caches, packages, plug_ins
from was_fx.doctor.kernel_plan import KernelUse
from was_fx.doctor.self_test import SelfTest, self_test
from was_fx.schedules.progress import Progress


@dataclass(frozen=True)
class Diagnosis:
    """What was found; each part is documented where it is made.

    Attributes:
        device: that was looked at.
        packages: versions.
        processor: the CPU and its kernels.
        gpus: CUDA devices.
        plug_ins: registrations with other libraries.
        caches: folders.
        self_test: the kernels of the device against plain PyTorch.
    """

    device: str
    packages: tuple[Package, ...]
    processor: Processor
    gpus: tuple[Gpu, ...]
    plug_ins: tuple[PlugIn, ...]
    caches: tuple[Cache, ...]
    self_test: tuple[SelfTest, ...]


def diagnose(device: torch.device, progress: Progress | None = None) -> Diagnosis:
    """Look at everything; takes some seconds, on a GPU until its kernels are compiled.

    Args:
        device: whose kernels are tested.
        progress: called with (products tested, all products).
    """
    return Diagnosis(
        device=str(device),
        packages=tuple(packages()),
        processor=processor(),
        gpus=tuple(gpus()),
        plug_ins=tuple(plug_ins()),
        caches=tuple(caches()),
        self_test=tuple(self_test(device, progress)),
    )


def problems(found: Diagnosis, plan: Sequence[KernelUse] = ()) -> list[str]:
    """A sentence for each thing that is broken, which says what to do; the C++ kernels count on a CPU only, and GPUs
    only where one is looked at."""
    on_cpu = found.device == "cpu"
    each = [*found.packages, *found.plug_ins, *([found.processor] if on_cpu else found.gpus)]
    sentences = [part.problem for part in each if part.problem]
    wrong = [row for row in found.self_test if not row.passed]
    for implementation in dict.fromkeys(row.implementation for row in wrong):
        sentences.append(_wrong(implementation, [row for row in wrong if row.implementation == implementation], on_cpu))
    return [*sentences, *(use.problem for use in plan if use.problem)]


def _wrong(implementation: str, rows: list[SelfTest], on_cpu: bool) -> str:
    first = rows[0]
    if first.failure:
        what = f"fails: {first.failure}"
    else:
        what = f"is off by {first.error:.1e} where {first.tolerance:.0e} is allowed"
    remedy = (
        "delete the compiled C++ kernels named above so that they are compiled anew, or set WAS_FX_CPU_KERNELS=plain"
        if on_cpu
        else "install the versions of torch and triton that belong together, and empty Triton's cache"
    )
    shape = f"{first.weights} {list(first.shape)}, {first.tokens} tokens of {first.dtype}"
    return f"{implementation or 'a kernel'} {what} ({shape}; {len(rows)} products in all); {remedy}"

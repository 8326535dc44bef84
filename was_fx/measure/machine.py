"""`environment`: what a measurement was made on and with."""

import platform
from pathlib import Path

import torch
import transformers

from was_fx.version import __version__


def environment(device: str = "cpu") -> dict[str, str | int]:
    """The processor or GPU by name, threads, and versions."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "was_fx": __version__,
    }


def processor_name() -> str:
    """What the processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

"""Which GPU work is queued on."""

import contextlib

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which `device`, where it is a GPU, is torch's current one: kernels, events and captures go there."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)

"""GPUs that there is none of here: what is said of them, and what their kernels would be launched with."""

from types import SimpleNamespace

import pytest
import torch

from was_fx.doctor import hardware
from was_fx.kernels.parts import gemv_config, triton_parts
from was_fx.kernels.parts.gemv_config import heuristic, tuned

# Capability, multiprocessors.
GPUS = {
    "NVIDIA A100-SXM4-80GB": ((8, 0), 108),
    "NVIDIA GeForce RTX 4090": ((8, 9), 128),
    "NVIDIA L40S": ((8, 9), 142),
    "NVIDIA GH200 480GB": ((9, 0), 132),
    "NVIDIA H200": ((9, 0), 132),
}
SHAPES = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)), (4096, (128256,))]


@pytest.fixture
def gpu(request, monkeypatch, tmp_path):
    """torch finds one GPU of this name."""
    capability, count = GPUS[request.param]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=count)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WAS_FX_NO_PDL", raising=False)
    caches = (tuned, gemv_config.multiprocessors, triton_parts._capability)
    for each in caches:
        each.cache_clear()
    yield request.param
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize("gpu", [name for name in GPUS if name != "NVIDIA H200"], indirect=True)
def test_a_gpu_that_was_never_measured_has_tile_sizes_by_the_rule(gpu):
    capability, count = GPUS[gpu]
    (found,) = hardware.gpus()
    assert (found.name, found.capability, found.multiprocessors, found.measured) == (gpu, capability, count, 0)
    assert found.problem == ""
    device = torch.device("cuda", 0)
    for channels, sizes in SHAPES:
        for format in (torch.bfloat16, "int8", "int4"):
            expected = heuristic(channels, sizes, format, count)
            assert gemv_config.gemv_config(device, format, channels, sizes) == expected


@pytest.mark.parametrize("gpu", ["NVIDIA H200"], indirect=True)
def test_measured_tile_sizes_come_first(gpu):
    (found,) = hardware.gpus()
    known = tuned("nvidia_h200.json")
    assert found.measured == len(known) > 0
    chosen = gemv_config.gemv_config(torch.device("cuda", 0), torch.bfloat16, 14336, (4096,))
    assert chosen == known["14336,4096,bfloat16"] != heuristic(14336, (4096,), torch.bfloat16, 132)


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
@pytest.mark.parametrize("off", [False, True], ids=["", "turned off"])
def test_kernels_are_launched_ahead_from_capability_9_on(gpu, off, monkeypatch):
    if off:
        monkeypatch.setenv("WAS_FX_NO_PDL", "1")
    ahead = GPUS[gpu][0] >= (9, 0) and not off
    assert hardware.gpus()[0].ahead == ahead
    options = triton_parts.launch_options(SimpleNamespace(device=torch.device("cuda", 0)))
    assert options == ({"PDL": True, "launch_pdl": True} if ahead else {"PDL": False})


@pytest.mark.parametrize("gpu", ["NVIDIA L40S"], indirect=True)
def test_a_damaged_file_of_tile_sizes_is_a_problem(gpu):
    path = gemv_config.user_folder() / "nvidia_l40s.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    (found,) = hardware.gpus()
    assert "nvidia_l40s.json is not a tuning file" in found.problem
    assert found.measured == 0

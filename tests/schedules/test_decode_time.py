"""Predicted decode steps."""

import pytest

from was_fx.schedules.decode_time import BYTES, find_gpu, known_gpus, predict, read_range

BODY, HEAD = 13.96e9, 1.05e9  # bytes of Llama-3-8B in bf16


@pytest.mark.parametrize("weights", list(BYTES))
@pytest.mark.parametrize("gpu", known_gpus())
def test_what_was_measured_is_met(gpu, weights):
    found = predict(gpu, weights, 32, 4e9, BODY + HEAD)
    assert 0 < found.miss < 0.12
    assert found.measured >= 3
    assert "Llama-3-8B" in found.models


def test_a_faster_gpu_and_fewer_bytes_take_less():
    by_gpu = [predict(gpu, "bf16", 32, 8.03e9, BODY + HEAD).ms for gpu in ("NVIDIA H100", "NVIDIA H200")]
    assert by_gpu == pytest.approx([3.68, 3.08], rel=0.1)
    times = [predict("NVIDIA H200", "bf16", 32, read, BODY + HEAD).ms for read in (4e9, 6e9, 8e9)]
    assert times == sorted(times)
    # No memory of an H100 reads 1 GB in less than 0.3 ms.
    few, many = (predict("NVIDIA H100", "bf16", 32, read, BODY + HEAD).ms for read in (4e9, 8e9))
    assert many - few > 4 * 0.29
    assert predict("NVIDIA H200", "bf16", 32, 8e9, BODY + HEAD).dense_ms == pytest.approx(5.61, rel=0.02)
    assert predict("NVIDIA H100", "bf16", 32, 8e9, BODY + HEAD).dense_ms is None


def test_names_and_ranges():
    assert find_gpu("h200") == find_gpu("NVIDIA H200") == "NVIDIA H200"
    with pytest.raises(ValueError, match="'a100'; known are NVIDIA H100, NVIDIA H200"):
        find_gpu("a100")
    least, most = read_range("NVIDIA H200", "bf16")
    assert least < 1.01e9 < 13.02e9 < most

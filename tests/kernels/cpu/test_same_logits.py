"""A whole model by every kind of C++ kernel, prompt and decode steps: the logits are the same up to rounding."""

import os

import pytest
import torch

import was_fx
from was_fx import embedded
from was_fx.kernels.cpu import library

if library.library() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


def logits(model, ids, kind) -> torch.Tensor:
    """Of the last tokens of a prompt and of three steps after it, [6, V] in fp32."""
    os.environ[library.LIMIT] = kind
    library.kind.cache_clear()
    found = model(ids[:, :-3], use_cache=True)
    parts = [found.logits[0, -3:]]
    for step in range(3):
        place = ids.shape[1] - 3 + step
        found = model(ids[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
        parts.append(found.logits[0])
    return torch.cat(parts).float()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
@torch.no_grad()
def test_every_kind_gives_the_same_logits(dtype, tolerance, monkeypatch):
    monkeypatch.setenv(library.LIMIT, "")
    model, _ = embedded.load(dtype)
    ids = embedded.tokens("test", 40, 1)
    calibration = was_fx.calibrate(model, embedded.tokens("calibration", 128, 2))
    was_fx.sparsify(model, was_fx.uniform(calibration, 0.5))
    first, *others = [logits(model, ids, kind) for kind in library.KINDS[: library.library().was_processor() + 1]]
    library.kind.cache_clear()
    for other in others:
        assert ((other - first).abs().max() / first.abs().max()) < tolerance

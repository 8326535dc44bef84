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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_every_kind_gives_the_same_logits(dtype, monkeypatch):
    """In 16 bits they differ as much as any two orders of rounding do: each is as near to fp32 as the plain kind is."""
    monkeypatch.setenv(library.LIMIT, "")
    ids = embedded.tokens("test", 40, 1)
    exact, _ = embedded.load(torch.float32)
    schedule = was_fx.uniform(was_fx.calibrate(exact, embedded.tokens("calibration", 128, 2)), 0.5)
    model, _ = embedded.load(dtype)
    for each in (exact, model):
        was_fx.sparsify(each, schedule, allow_other_model=True)
    expected = logits(exact, ids, "plain")
    errors = {
        kind: float((logits(model, ids, kind) - expected).norm() / expected.norm())
        for kind in library.KINDS[: library.library().was_processor() + 1]
    }
    library.kind.cache_clear()
    # Channels near their threshold fall on either side of it.
    limit = 1e-5 if dtype == torch.float32 else 2 * errors["plain"]
    assert max(errors.values()) <= limit, errors
    assert errors["plain"] < 0.2

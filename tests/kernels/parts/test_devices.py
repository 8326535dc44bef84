"""Work on a GPU that is not torch's current one; torch.cuda is stood in for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from was_fx.kernels.parts import registration
from was_fx.kernels.parts.devices import on


@pytest.fixture
def current(monkeypatch):
    """Indices of the current GPU, the last being that of now; 0 at first."""
    found = [0]

    @contextlib.contextmanager
    def device(chosen):
        found.append(chosen.index)
        yield
        found.append(0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return found


@pytest.mark.parametrize("name", ["cpu", "meta", "cuda", "cuda:0"])
def test_nothing_is_changed_where_it_is_current_or_no_gpu(name, current):
    with on(torch.device(name)):
        assert current == [0]


def test_another_gpu_is_current_meanwhile(current):
    with on(torch.device("cuda:1")):
        assert current[-1] == 1
    assert current[-1] == 0


@pytest.mark.parametrize("listed", [False, True])
def test_ops_run_on_the_gpu_of_their_first_argument(listed, current):
    op = registration._on_its_device(lambda x, add, more=0: (current[-1], add + more))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    assert op([x] if listed else x, 2, more=3) == (1, 5)
    x = SimpleNamespace(is_cuda=False)
    assert op([x] if listed else x, 2) == (0, 2)

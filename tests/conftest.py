"""Fixtures that more than one folder uses."""

import copy
import os
from collections.abc import Callable, Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Graphs of one test must not serve, or exhaust the limits of, another."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def _embedded_model():
    from was_fx import embedded

    model, _ = embedded.load(torch.float32)
    return model


@pytest.fixture
def embedded_model(_embedded_model) -> torch.nn.Module:
    """The embedded model in fp32, dense, a copy of the test's own."""
    return copy.deepcopy(_embedded_model)


@pytest.fixture(scope="session")
def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(_llama) -> torch.nn.Module:
    """A Llama of two blocks with random weights, fp32, a copy of the test's own; quick to trace."""
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """LongTensor [4, 64] in the vocabulary of `llama`."""
    return torch.randint(2, 128, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def calibration(_llama, tokens):
    """Calibration of `llama` with the WAS score."""
    import was_fx

    return was_fx.calibrate(_llama, tokens)


@pytest.fixture(scope="session")
def oracle() -> Callable:
    """A dense copy of a model whose Linears see their input with the dropped channels zeroed, by forward hooks.

    Written apart from the package: thresholds are recomputed here from the weights and the schedule's numbers.
    """

    def build(model: torch.nn.Module, schedule) -> torch.nn.Module:
        copied = copy.deepcopy(model)
        for name, entry in schedule.linears.items():
            module = copied.get_submodule(name)
            weight = module.weight.detach().double()
            outputs = 1 if type(module).__name__ == "Conv1D" else 0
            norm = weight.abs().sum(outputs) if schedule.norm == 1 else weight.square().sum(outputs).sqrt()
            threshold = (entry.threshold / norm**entry.exponent).float()

            def zero_dropped(_, inputs, threshold=threshold):
                (x,) = inputs
                return (torch.where(x.abs().float() <= threshold, torch.zeros_like(x), x),)

            module.register_forward_pre_hook(zero_dropped)
        return copied

    return build

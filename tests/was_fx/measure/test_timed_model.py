"""`TimedModel.steps`: what its steps read, and that they begin after the same prompt each time."""

import pytest
import torch

from was_fx.measure.timed_model import WARM_UP, Load, TimedModel

STEPS = WARM_UP + 2


@pytest.fixture
def prompts(tokens):
    return tokens[:3, :16]


def timed(model, prompts, together=1):
    """A timed model, and the lengths of the model's calls."""
    called: list[int] = []
    model.register_forward_pre_hook(lambda *given: called.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    return TimedModel(model, Load(prompts, prompts, STEPS, "static", together=together), model), called


@torch.no_grad()
@pytest.mark.parametrize("together", [1, 3])
def test_each_step_reads_what_comes_after_the_tokens_before_it(llama, prompts, together):
    found, _ = timed(llama, prompts, together)
    ms, text = found.steps()
    assert ms > 0
    assert text.shape == (3, STEPS * together)
    everything = torch.cat([prompts, text], dim=1)
    after = llama(input_ids=everything, use_cache=False).logits.argmax(-1)
    assert text.equal(after[:, 16 - together : -together]), "what comes after each of the tokens before"


@torch.no_grad()
def test_the_prompt_is_read_once_and_steps_taken_back(llama, prompts):
    found, called = timed(llama, prompts)
    first = found.steps()[1]
    assert found.steps(2)[1].equal(first[:, :2])
    assert found.steps()[1].equal(first)
    assert called == [16] + [1] * (2 * STEPS + 2)


@torch.no_grad()
def test_a_window_reads_its_prompt_again(prompts):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(**shape, num_key_value_heads=1, vocab_size=128, sliding_window=8, initializer_range=0.1)
    found, called = timed(MistralForCausalLM(config).eval(), prompts)
    assert found.steps()[1].equal(found.steps()[1])
    assert called.count(16) == 2
